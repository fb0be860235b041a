"""The legacy quants: blocks of 32 weights with one scale (and minimum) each, searched if weights have importance.

Equal `quantize_row_q*_ref` and `dequantize_row_q*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats, f2, i1, u1, u4
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.blocks.lanes import (
    LANES,
    as_codes,
    as_lanes,
    codes_as_lanes,
    extremes,
    fifth_bits,
    halves,
    per_lane,
    put_lanes,
)
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.affine import AffineFit
from gguforge.quant.search.base import as_groups, f32, scratch
from gguforge.quant.search.symmetric import SymmetricFit

SIZE = 32
TILE = 4096  # blocks: of what takes two dozen short passes, many at once
FINE = (-0.9, 0.05, 36)  # the candidates of AffineFit where the importance is known
SIGN = np.int32(-(2**31))
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0)).view(np.int32)
u8 = np.uint8


def reciprocal(d: Floats) -> Floats:
    """1 / d, and 0 where d is 0; infinite where d is denormal, as in C."""
    inverse: Floats = f32(1) / d
    inverse[d == 0] = 0
    return inverse


def settle(t: Floats, inverse: Floats) -> Floats:
    """What an infinite `inverse` made infinite or NaN, x86 converts to 0; in place."""
    if not np.isfinite(inverse).all():
        t[~np.isfinite(t)] = 0
    return t


def levels_of(fit: SymmetricFit | AffineFit, n: int) -> Bytes:
    """The kept levels of all n blocks, shape (8, 4 * n)."""
    columns = fit.levels(np.arange(n)).astype(np.uint8).reshape(-1, LANES, n)
    return np.ascontiguousarray(columns.transpose(0, 2, 1)).reshape(-1, LANES * n)


def encode_symmetric(x: Floats, w: Floats | None, half: int) -> tuple[Floats, Bytes]:
    """Scale and levels 0..2*half-1, without `w` with the extreme weight at -half: Q4_0 (8) and Q5_0 (16)."""
    if w is not None:
        fit = SymmetricFit(as_groups(x, SIZE), half, as_groups(w, SIZE, "weights"))
        return fit.scale, levels_of(fit, len(x))
    lanes = as_lanes(x)
    top, bottom = extremes(lanes)
    peak = np.where(top > -bottom, top, bottom)
    tie = np.flatnonzero(top == -bottom)
    peak[tie] = x[tie, np.abs(x[tie]).argmax(axis=1)]  # the first of equals
    d = (peak + f32(0)) / f32(-half)  # -0 becomes +0, which C's search starts from
    inverse = reciprocal(d)
    np.multiply(lanes, per_lane(inverse), out=lanes)
    lanes += f32(half + 0.5)
    levels = as_codes(settle(lanes, inverse))
    return d, np.minimum(levels, np.full(levels.shape[1], 2 * half - 1, np.uint8), out=levels)  # a scalar is slow


def encode_range(x: Floats, w: Floats | None, top: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, minimum and levels 0..top, which span the block without `w`: Q4_1 (15) and Q5_1 (31)."""
    if w is not None:
        fit = AffineFit(as_groups(x, SIZE), as_groups(w, SIZE, "weights"), top, *FINE)
        return fit.scale, -fit.minimum, levels_of(fit, len(x))
    lanes = as_lanes(x)
    high, low = extremes(lanes)
    signed = np.flatnonzero(low == 0)  # of +0 and -0 the C code keeps the first
    low[signed] = x[signed, (x[signed] == 0).argmax(axis=1)]
    d = (high - low) / f32(top) + f32(0)
    inverse = reciprocal(d)
    np.subtract(lanes, per_lane(low), out=lanes)
    np.multiply(lanes, per_lane(inverse), out=lanes)
    lanes += f32(0.5)
    return d, low, as_codes(settle(lanes, inverse))  # never above `top`: rounding adds far less than a half


def pack_nibbles(levels: Bytes) -> Bytes:
    """Levels 0..15, shape (n, 32): the first half in the low nibbles, the second in the high ones."""
    return levels[:, :16] | levels[:, 16:] << u8(4)


def unpack_nibbles(packed: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`."""
    return np.concatenate([packed & u8(15), packed >> u8(4)], axis=1)


def unpack_fifth_bit(words: NDArray[np.uint32]) -> Bytes:
    """The inverse of `fifth_bits`: bit 4 of every level, shape (n, 32)."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    return np.unpackbits(octets, axis=1, bitorder="little") << u8(4)


class Nibbles(GroupedBlock, abstract=True):
    """What the 4-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        Nibbles.put_lanes(codes_as_lanes(codes), out)

    @staticmethod
    def put_lanes(codes: Bytes, out: Blocks) -> None:
        """Fill in the levels from codes of shape (8, 4 * n)."""
        put_lanes(halves(codes), out["qs"])


class FiveBits(GroupedBlock, abstract=True):
    """What the 5-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"]) | unpack_fifth_bit(b["qh"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        FiveBits.put_lanes(codes_as_lanes(codes), out)

    @staticmethod
    def put_lanes(codes: Bytes, out: Blocks) -> None:
        """Fill in the levels from codes of shape (8, 4 * n)."""
        put_lanes(halves(codes & u8(15)), out["qs"])
        out["qh"] = fifth_bits(codes)


class Q4_0(Nibbles, type=T.Q4_0, size=SIZE, tile=TILE, importance="row", levels=(-8, 7), d=f2, qs=(u1, 16)):
    """4-bit levels around zero: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], codes = encode_symmetric(x, w, 8)
        Q4_0.put_lanes(codes, out)


class Q4_1(
    Nibbles, type=T.Q4_1, size=SIZE, tile=TILE, importance="row", levels=(0, 15), offset="m",
    d=f2, m=f2, qs=(u1, 16),
):  # fmt: skip
    """4-bit levels above a minimum: 5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], out["m"], codes = encode_range(x, w, 15)
        Q4_1.put_lanes(codes, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Floats, Floats]:
        return plus_and_minus_one(len(b))


class Q5_0(FiveBits, type=T.Q5_0, size=SIZE, tile=TILE, importance="row", levels=(-16, 15), d=f2, qh=u4, qs=(u1, 16)):
    """5-bit levels around zero: 5.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], codes = encode_symmetric(x, w, 16)
        Q5_0.put_lanes(codes, out)


class Q5_1(
    FiveBits, type=T.Q5_1, size=SIZE, tile=TILE, importance="row", levels=(0, 31), offset="m",
    d=f2, m=f2, qh=u4, qs=(u1, 16),
):  # fmt: skip
    """5-bit levels above a minimum: 6 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], out["m"], codes = encode_range(x, w, 31)
        Q5_1.put_lanes(codes, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Floats, Floats]:
        return plus_and_minus_one(len(b))


def plus_and_minus_one(n: int) -> tuple[Floats, Floats]:
    """The scales of blocks that store what is to be added, not what is to be subtracted: shape (n, 1) each."""
    one = np.ones((n, 1), np.float32)
    return one, -one


class Q8_0(GroupedBlock, type=T.Q8_0, size=SIZE, tile=TILE, levels=(-127, 127), zero=0, d=f2, qs=(i1, 32)):
    """8-bit levels around zero: 8.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        lanes = as_lanes(x)
        top, bottom = extremes(lanes)
        peak: Floats = np.maximum(top, -bottom)
        d = peak / f32(127) + f32(0)  # -0 becomes +0
        inverse = reciprocal(d)
        np.multiply(lanes, per_lane(inverse), out=lanes)
        out["d"] = d
        put_lanes(as_codes(half_away(settle(lanes, inverse)), np.int8), out["qs"])

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        codes: Bytes = b["qs"].view(np.uint8)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = codes.view(np.int8)


def half_away(t: Floats) -> Floats:
    """What C's `roundf` truncates to the same integer, for |t| <= 127; in place.

    Adding 0.5 would round the float just below 0.5 up to 1; adding that float rounds every half up, and nothing else.
    """
    nearly = np.bitwise_and(t.view(np.int32), SIGN, out=scratch("nearly", t.shape).view(np.int32))
    nearly |= BELOW_HALF
    t += nearly.view(np.float32)
    return t


def round_half_away(t: Floats) -> NDArray[np.int8]:
    """C's `(int8_t) roundf(t)` for |t| <= 127, which uses `t` up."""
    return half_away(t).astype(np.int8)
