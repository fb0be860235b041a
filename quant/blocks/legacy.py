"""The legacy quants: blocks of 32 weights with one scale (and minimum) each, searched if weights have importance.

Equal `quantize_row_q*_ref` and `dequantize_row_q*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats, f2, i1, u1, u4
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.affine import AffineFit
from gguforge.quant.search.base import as_groups, f32
from gguforge.quant.search.symmetric import SymmetricFit

SIZE = 32
FINE = (-0.9, 0.05, 36)  # the candidates of AffineFit where the importance is known
u8 = np.uint8


def reciprocal(d: Floats) -> Floats:
    """1 / d, and 0 where d is 0; infinite where d is denormal, as in C."""
    inverse: Floats = np.where(d != 0, f32(1) / d, f32(0))
    return inverse


def truncate(t: Floats, inverse: Floats, high: int) -> Bytes:
    """C's `MIN(high, (int8_t) t)`; an infinite `inverse` makes t infinite or NaN, which x86 truncates to 0."""
    if not np.isfinite(inverse).all():
        t = np.where(np.isfinite(t), t, f32(0))
    return np.minimum(t, f32(high)).astype(np.uint8)


def extreme_of_rows(x: Floats) -> Floats:
    """The element of largest magnitude of each block, the first of equals, +0 if all are zero; (n, 32) -> (n, 1)."""
    top, bottom = x.max(axis=1, keepdims=True), x.min(axis=1, keepdims=True)
    peak: Floats = np.where(top > -bottom, top, bottom)
    tie = np.flatnonzero(top == -bottom)
    peak[tie, 0] = x[tie, np.abs(x[tie]).argmax(axis=1)]
    return peak + f32(0)  # -0 becomes +0, which C's search starts from


def levels_of(fit: SymmetricFit | AffineFit, n: int) -> Bytes:
    """The kept levels of all n blocks, shape (n, 32)."""
    return np.ascontiguousarray(fit.levels(np.arange(n)).astype(np.uint8).T)


def encode_symmetric(x: Floats, w: Floats | None, half: int) -> tuple[NDArray[np.float16], Bytes]:
    """Scale and levels 0..2*half-1, without `w` with the extreme weight at -half: Q4_0 (8) and Q5_0 (16)."""
    if w is not None:
        fit = SymmetricFit(as_groups(x, SIZE), half, as_groups(w, SIZE, "weights"))
        return fit.scale.astype(np.float16), levels_of(fit, len(x))
    d = extreme_of_rows(x) / f32(-half)
    inverse = reciprocal(d)
    levels = truncate(x * inverse + f32(half + 0.5), inverse, 2 * half - 1)
    return d[:, 0].astype(np.float16), levels


def encode_range(x: Floats, w: Floats | None, top: int) -> tuple[NDArray[np.float16], NDArray[np.float16], Bytes]:
    """Scale, minimum and levels 0..top, which span the block without `w`: Q4_1 (15) and Q5_1 (31)."""
    if w is not None:
        fit = AffineFit(as_groups(x, SIZE), as_groups(w, SIZE, "weights"), top, *FINE)
        return fit.scale.astype(np.float16), (-fit.minimum).astype(np.float16), levels_of(fit, len(x))
    low = x.min(axis=1, keepdims=True)
    signed = np.flatnonzero(low == 0)  # of +0 and -0 the C code keeps the first
    low[signed, 0] = x[signed, (x[signed] == 0).argmax(axis=1)]
    d = (x.max(axis=1, keepdims=True) - low) / f32(top) + f32(0)
    inverse = reciprocal(d)
    levels = truncate((x - low) * inverse + f32(0.5), inverse, top)
    return d[:, 0].astype(np.float16), low[:, 0].astype(np.float16), levels


def pack_nibbles(levels: Bytes) -> Bytes:
    """Levels 0..15, shape (n, 32): the first half in the low nibbles, the second in the high ones."""
    return levels[:, :16] | levels[:, 16:] << u8(4)


def unpack_nibbles(packed: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`."""
    return np.concatenate([packed & u8(15), packed >> u8(4)], axis=1)


def pack_fifth_bit(levels: Bytes) -> NDArray[np.uint32]:
    """Bit 4 of each level as bit j of one little-endian word, shape (n,)."""
    words: NDArray[np.uint32] = np.packbits(levels >> 4, axis=1, bitorder="little").view("<u4")[:, 0]
    return words


def unpack_fifth_bit(words: NDArray[np.uint32]) -> Bytes:
    """The inverse of `pack_fifth_bit`, in place 4; shape (n, 32)."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    return np.unpackbits(octets, axis=1, bitorder="little") << u8(4)


class Nibbles(GroupedBlock, abstract=True):
    """What the 4-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_nibbles(codes)


class FiveBits(GroupedBlock, abstract=True):
    """What the 5-bit types share: how levels are stored."""

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_nibbles(b["qs"]) | unpack_fifth_bit(b["qh"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"], out["qh"] = pack_nibbles(codes & u8(15)), pack_fifth_bit(codes)


class Q4_0(Nibbles, type=T.Q4_0, size=SIZE, importance="row", levels=(-8, 7), d=f2, qs=(u1, 16)):
    """4-bit levels around zero: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], codes = encode_symmetric(x, w, 8)
        Q4_0.put_codes(codes, out)


class Q4_1(
    Nibbles, type=T.Q4_1, size=SIZE, importance="row", levels=(0, 15), offset="m",
    d=f2, m=f2, qs=(u1, 16),
):  # fmt: skip
    """4-bit levels above a minimum: 5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], out["m"], codes = encode_range(x, w, 15)
        Q4_1.put_codes(codes, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Floats, Floats]:
        return plus_and_minus_one(len(b))


class Q5_0(FiveBits, type=T.Q5_0, size=SIZE, importance="row", levels=(-16, 15), d=f2, qh=u4, qs=(u1, 16)):
    """5-bit levels around zero: 5.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], codes = encode_symmetric(x, w, 16)
        Q5_0.put_codes(codes, out)


class Q5_1(
    FiveBits, type=T.Q5_1, size=SIZE, importance="row", levels=(0, 31), offset="m",
    d=f2, m=f2, qh=u4, qs=(u1, 16),
):  # fmt: skip
    """5-bit levels above a minimum: 6 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"], out["m"], codes = encode_range(x, w, 31)
        Q5_1.put_codes(codes, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Floats, Floats]:
        return plus_and_minus_one(len(b))


def plus_and_minus_one(n: int) -> tuple[Floats, Floats]:
    """The scales of blocks that store what is to be added, not what is to be subtracted: shape (n, 1) each."""
    one = np.ones((n, 1), np.float32)
    return one, -one


class Q8_0(GroupedBlock, type=T.Q8_0, size=SIZE, levels=(-127, 127), zero=0, d=f2, qs=(i1, 32)):
    """8-bit levels around zero: 8.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        d = np.abs(x).max(axis=1, keepdims=True) / f32(127)
        inverse = reciprocal(d)
        out["d"] = d[:, 0].astype(np.float16)
        out["qs"] = round_half_away(x * inverse, inverse)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        codes: Bytes = b["qs"].view(np.uint8)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = codes.view(np.int8)


def round_half_away(t: Floats, inverse: Floats) -> NDArray[np.int8]:
    """C's `(int8_t) roundf(t)` for |t| <= 127; not finite (from an infinite `inverse`) gives 0."""
    if not np.isfinite(inverse).all():
        t = np.where(np.isfinite(t), t, f32(0))
    # t + copysign(0.5) alone would send the float just below 0.5 up to 1; so would it in C, were roundf not exact.
    whole = np.trunc(t)
    whole += np.copysign(np.abs(t - whole) >= f32(0.5), t)
    return whole.astype(np.int8)
