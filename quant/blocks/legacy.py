"""The legacy quants: blocks of 32 weights with one scale (and minimum) each, searched if weights have importance.

Equal `quantize_row_q*_ref` and `dequantize_row_q*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats, Kind, f2, i1, u1, u4
from gguforge.quant.blocks.floats import F32
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.blocks.lanes import (
    LANES,
    Words,
    as_codes,
    as_lanes,
    codes_as_lanes,
    extremes,
    fifth_bits,
    halves,
    largest,
    magnitudes,
    per_lane,
    put_lanes,
    signs,
    with_signs,
)
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.affine import AffineFit
from gguforge.quant.search.base import as_groups, f32, scratch
from gguforge.quant.search.symmetric import SymmetricFit

SIZE = 32
TILE = 16384  # blocks: of what takes two dozen short passes, many at once
FINE = (-0.9, 0.05, 36)  # the candidates of AffineFit where the importance is known
SIGN = np.int32(-(2**31))
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""Added before truncating: it rounds every half up, while 0.5 would round the float below one half up too."""
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


def numbers(words: Words, stored: Kind, purpose: str) -> Floats:
    """Words as float32, in working memory where they are not float32 already."""
    if stored is F32:
        return words.view(np.float32)
    out = scratch(purpose, words.shape)
    stored.to_float(words.view(stored.layout["value"]), out)
    return out


def symmetric(words: Words, stored: Kind, half: int) -> tuple[Floats, Bytes]:
    """Scale and levels 0..2*half-1, the extreme weight at -half: Q4_0 (8) and Q5_0 (16)."""
    lanes = as_lanes(words)
    found = extremes(lanes)
    top, bottom = found
    up, down = magnitudes(found)
    peak = (top ^ bottom) * (up > down).astype(words.dtype) ^ bottom  # a tenth of the time of np.where
    tie = np.flatnonzero(up == down)
    if tie.size:
        some = words.take(tie, axis=0)
        peak[tie] = some[np.arange(tie.size), magnitudes(some).argmax(axis=1)]  # the first of equals
    d = (numbers(peak, stored, "peak") + f32(0)) / f32(-half)  # -0 becomes +0, which C's search starts from
    inverse = reciprocal(d)
    t = numbers(lanes, stored, "numbers")
    t *= per_lane(inverse)
    t += f32(half + 0.5)
    levels = as_codes(settle(t, inverse))
    most = scratch("most", (len(words),)).view(np.uint8)  # a row of it: a scalar is slow
    most.fill(2 * half - 1)
    return d, np.minimum(levels, most, out=levels)


def span(words: Words, stored: Kind, top: int) -> tuple[Floats, Floats, Bytes]:
    """Scale, minimum and levels 0..top, which span the block: Q4_1 (15) and Q5_1 (31)."""
    lanes = as_lanes(words)
    high, low = numbers(extremes(lanes), stored, "extremes of blocks")
    alike = np.flatnonzero((high <= 0) | (low >= 0))  # of one sign, or zero: few
    if alike.size:
        x = numbers(words.take(alike, axis=0), stored, "alike")
        high[alike] = x.max(axis=1)
        low[alike] = least(x)
    d = (high - low) / f32(top) + f32(0)
    inverse = reciprocal(d)
    t = numbers(lanes, stored, "numbers")
    t -= per_lane(low)
    t *= per_lane(inverse)
    t += f32(0.5)
    return d, low, as_codes(settle(t, inverse))  # never above `top`: rounding adds far less than a half


def least(x: Floats) -> Floats:
    """The smallest weight of each block, shape (n, 32) -> (n,); of +0 and -0 the first, which the C code keeps."""
    low: Floats = x.min(axis=1)
    zero = np.flatnonzero(low == 0)
    low[zero] = x[zero, (x[zero] == 0).argmax(axis=1)]
    return low


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


class Legacy(GroupedBlock, abstract=True):
    """What all types here share: without importance a block is encoded from words, whichever float they are.

    Its scale is then a multiple of its extremes, so a NaN or an infinity among the weights shows there.
    """

    shows_nan = True

    @classmethod
    def encode_blocks(cls, x: Floats, w: Floats | None, out: Blocks) -> None:
        if w is None:
            cls.encode_words(x.view(u4), F32, out)
        else:
            cls.search(x, w, out)

    @classmethod
    def search(cls, x: Floats, w: Floats, out: Blocks) -> None:
        """Fill `out` from weights with importance."""
        raise NotImplementedError

    @staticmethod
    def put_lanes(codes: Bytes, out: Blocks) -> None:
        """Fill in the levels from codes of shape (8, 4 * n), which are used up."""
        raise NotImplementedError


class Nibbles(Legacy, abstract=True):
    """What the 4-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        Nibbles.put_lanes(codes_as_lanes(codes), out)

    @staticmethod
    def put_lanes(codes: Bytes, out: Blocks) -> None:
        put_lanes(halves(codes), out["qs"])


class FiveBits(Legacy, abstract=True):
    """What the 5-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"]) | unpack_fifth_bit(b["qh"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        FiveBits.put_lanes(codes_as_lanes(codes), out)

    @staticmethod
    def put_lanes(codes: Bytes, out: Blocks) -> None:
        out["qh"] = fifth_bits(codes)
        words = codes.view(np.uint32)
        words &= np.uint32(0x0F0F0F0F)
        put_lanes(halves(codes), out["qs"])


class Symmetric(Legacy, abstract=True):
    """Levels around zero: Q4_0 and Q5_0."""

    @classmethod
    def encode_words(cls, words: Words, stored: Kind, out: Blocks) -> None:
        out["d"], codes = symmetric(words, stored, -cls.low)
        cls.put_lanes(codes, out)

    @classmethod
    def search(cls, x: Floats, w: Floats, out: Blocks) -> None:
        fit = SymmetricFit(as_groups(x, SIZE), -cls.low, as_groups(w, SIZE, "weights"))
        out["d"] = fit.scale
        cls.put_lanes(levels_of(fit, len(x)), out)


class Spanning(Legacy, abstract=True):
    """Levels above a minimum: Q4_1 and Q5_1."""

    @classmethod
    def encode_words(cls, words: Words, stored: Kind, out: Blocks) -> None:
        out["d"], out["m"], codes = span(words, stored, cls.high)
        cls.put_lanes(codes, out)

    @classmethod
    def search(cls, x: Floats, w: Floats, out: Blocks) -> None:
        fit = AffineFit(as_groups(x, SIZE), as_groups(w, SIZE, "weights"), cls.high, *FINE)
        out["d"], out["m"] = fit.scale, -fit.minimum
        cls.put_lanes(levels_of(fit, len(x)), out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Floats, Floats]:
        """One and minus one: blocks store what is to be added, not what is to be subtracted."""
        one = np.ones((len(b), 1), np.float32)
        return one, -one


class Q4_0(Symmetric, Nibbles, type=T.Q4_0, size=SIZE, tile=TILE, importance="row", levels=(-8, 7), d=f2, qs=(u1, 16)):
    """4-bit levels around zero: 4.5 bpw."""


class Q4_1(
    Spanning, Nibbles, type=T.Q4_1, size=SIZE, tile=TILE, importance="row", levels=(0, 15), offset="m",
    d=f2, m=f2, qs=(u1, 16),
):  # fmt: skip
    """4-bit levels above a minimum: 5 bpw."""


class Q5_0(
    Symmetric, FiveBits, type=T.Q5_0, size=SIZE, tile=TILE, importance="row", levels=(-16, 15),
    d=f2, qh=u4, qs=(u1, 16),
):  # fmt: skip
    """5-bit levels around zero: 5.5 bpw."""


class Q5_1(
    Spanning, FiveBits, type=T.Q5_1, size=SIZE, tile=TILE, importance="row", levels=(0, 31), offset="m",
    d=f2, m=f2, qh=u4, qs=(u1, 16),
):  # fmt: skip
    """5-bit levels above a minimum: 6 bpw."""


class Q8_0(Legacy, type=T.Q8_0, size=SIZE, tile=TILE, levels=(-127, 127), zero=0, d=f2, qs=(i1, 32)):
    """8-bit levels around zero: 8.5 bpw."""

    @classmethod
    def encode_words(cls, words: Words, stored: Kind, out: Blocks) -> None:
        lanes = as_lanes(words)
        negative = signs(lanes)
        magnitudes(lanes, out=lanes)
        d = numbers(largest(lanes), stored, "peak") / f32(127)
        inverse = reciprocal(d)
        t = numbers(lanes, stored, "numbers")
        t *= per_lane(inverse)
        settle(t, inverse)
        t += BELOW_HALF
        out["d"] = d
        put_lanes(with_signs(as_codes(t, np.int8), negative), out["qs"])

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        codes: Bytes = b["qs"].view(np.uint8)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = codes.view(np.int8)


def round_half_away(t: Floats) -> NDArray[np.int8]:
    """C's `(int8_t) roundf(t)` for |t| <= 127, which uses `t` up."""
    nearly = np.bitwise_and(t.view(np.int32), SIGN, out=scratch("nearly", t.shape).view(np.int32))
    nearly |= BELOW_HALF.view(np.int32)
    t += nearly.view(np.float32)
    return t.astype(np.int8)
