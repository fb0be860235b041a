"""The k-quants: super-blocks of 256 weights whose groups have scales of their own, quantized in turn.

Each `encode_blocks` has three steps: search a scale for every group, round the scales to their few bits, round the
weights again with the scales that will really be read back. Where a rounded scale is zero the levels of the search are
kept, as in the C code. Equals `quantize_row_q*_K_ref` and `dequantize_row_q*_K` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats, f2, i1, u1
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.affine import AffineFit
from gguforge.quant.search.base import GROUP_MAX_EPS, add_up, as_groups, extreme, f32, nearest_int, round_into, scratch
from gguforge.quant.search.descent import DescentFit
from gguforge.quant.search.positive import PositiveFit
from gguforge.quant.search.symmetric import SymmetricFit

SUPER = 256
FINE = (-0.9, 0.05, 36)  # the candidates of AffineFit where the importance is known
u8 = np.uint8


def round_levels(
    x: Floats,
    d: Floats,
    low: int,
    high: int,
    fit: AffineFit | SymmetricFit | DescentFit,
    shift: int = 0,
    offset: Floats | None = None,
    finite: bool = True,
) -> Bytes:
    """The final rounding: levels of groups `x` (size, groups) for the scale `d` (and minimum `offset`) of each group.

    Groups whose scale is zero keep the levels of the search. `finite` promises that |x / d| < 2^22: not so where
    weights without importance were left out of the fit.

    Returns:
        shape (groups, size), values low + shift .. high + shift.
    """
    none = d == 0
    keep = np.flatnonzero(none)
    if len(keep):
        d = np.where(none, f32(1), d)
    level = scratch("final", x.shape)
    if offset is not None:
        x = np.add(x, offset, out=level)
    np.divide(x, d, out=level)
    round_into(level, low, high, finite)
    if shift:
        level += f32(shift)
    if len(keep):
        level[:, keep] = fit.levels(keep)
    codes = level.astype(np.uint8)
    rows = np.empty(codes.shape[::-1], np.uint8)
    for i, code in enumerate(codes):  # a third of the time of a transposed copy
        rows[:, i] = code
    return rows


def sequential_max(values: Floats) -> Floats:
    """The largest of each super-block's values and zero; shape (groups per block, n) -> (n,)."""
    top: Floats = np.maximum(values.max(axis=0), f32(0))
    return top


def per_block(values: Floats, groups: int) -> Floats:
    """Group values (n * groups,) as (groups, n)."""
    columns: Floats = np.ascontiguousarray(values.reshape(-1, groups).T)
    return columns


def per_group(values: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `per_block`: (groups, n) as (n * groups,)."""
    return np.ascontiguousarray(values.T).reshape(-1)


def quantize_positive(values: Floats, top: Floats, levels: int) -> tuple[Bytes, NDArray[np.float16]]:
    """Scales (groups, n) as integers 0..levels and the fp16 step; `top` is the largest of each block."""
    some = top > 0
    inverse = np.where(some, f32(levels) / np.where(some, top, f32(1)), f32(0))
    codes = np.minimum(nearest_int(inverse * values).astype(np.uint8), np.uint8(levels))
    return codes, (top / f32(levels)).astype(np.float16)


def round_scales(values: Floats, w: Floats | None, levels: int) -> tuple[Bytes, NDArray[np.float16]]:
    """Scales (groups, n) as integers 0..levels and the fp16 step; `w` is the importance of each group, if known."""
    if w is None:
        return quantize_positive(values, sequential_max(values), levels)
    fit = PositiveFit(values, w, levels)
    return fit.level.astype(np.uint8), fit.scale.astype(np.float16)


def pack_6bit(scales: Bytes, minimums: Bytes) -> Bytes:
    """Eight 6-bit scales and minimums, shape (8, n) each, as 12 bytes: shape (n, 12)."""
    out = np.empty((12, scales.shape[1]), np.uint8)
    out[0:4] = scales[:4] | (scales[4:] >> 4) << u8(6)
    out[4:8] = minimums[:4] | (minimums[4:] >> 4) << u8(6)
    out[8:12] = (scales[4:] & 15) | (minimums[4:] & 15) << u8(4)
    return out.T


def unpack_6bit(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse of `pack_6bit`: (n, 12) to scales (n, 8) and minimums (n, 8)."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & u8(63), (c & 15) | (a >> 6) << u8(4)], axis=1)
    minimums = np.concatenate([b & u8(63), (c >> 4) | (b >> 6) << u8(4)], axis=1)
    return scales, minimums


def fold(levels: Bytes, bits: int) -> Bytes:
    """Put the second half of each row `bits` higher into the same bytes as the first: (n, m) -> (n, m / 2).

    Eight bytes are shifted at once, so no level may lose bits over the edge of its byte; m is a multiple of 16.

    >>> fold(np.arange(16, dtype=np.uint8)[None], 4)[0].tolist()
    [128, 145, 162, 179, 196, 213, 230, 247]
    """
    words = np.ascontiguousarray(levels).view(np.uint64)
    half = words.shape[1] // 2
    return (words[:, :half] | words[:, half:] << np.uint64(bits)).view(np.uint8)


def pack_1bit(levels: Bytes) -> Bytes:
    """Levels 0..1, shape (n, 256), eight to a byte as Q3_K and Q5_K store their highest bits: shape (n, 32)."""
    return fold(fold(fold(levels, 4), 2), 1)


def pack_2bit(levels: Bytes) -> Bytes:
    """Levels 0..3, shape (n, 256), four to a byte as Q2_K and Q3_K store them: shape (n, 64)."""
    return fold(fold(levels.reshape(-1, 128), 4), 2).reshape(-1, 64)


def unpack_2bit(packed: Bytes) -> Bytes:
    """The inverse of `pack_2bit`, shape (n, 256)."""
    q = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (q & u8(3)).reshape(-1, SUPER)


class Q2_K(
    GroupedBlock, type=T.Q2_K, size=SUPER, tile=512, weighted_tile=1024, importance="block",
    group=16, levels=(0, 3), offset="dmin", scales=(u1, 16), qs=(u1, 64), d=f2, dmin=f2,
):  # fmt: skip
    """2-bit levels; 16 groups of 16 with 4-bit scales and minimums: 2.625 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = as_groups(x, 16)
        if w is None:
            weights = np.abs(groups, out=scratch("weights", groups.shape))
            fit, of_groups = AffineFit(groups, weights, 3, -0.5, 0.1, 15, absolute=True), None
        else:
            fit = AffineFit(groups, as_groups(w, 16, "weights"), 3, *FINE)
            of_groups = per_block(fit.sum_w, 16)
        s, d = round_scales(per_block(fit.scale, 16), of_groups, 15)
        m, dmin = round_scales(per_block(fit.minimum, 16), of_groups, 15)
        out["d"], out["dmin"], out["scales"] = d, dmin, (s | m << 4).T
        step = per_group(d.astype(np.float32) * s)
        offset = per_group(dmin.astype(np.float32) * m)
        Q2_K.put_codes(round_levels(groups, step, 0, 3, fit, offset=offset, finite=w is None), out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Bytes, Bytes]:
        return b["scales"] & u8(15), b["scales"] >> u8(4)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_2bit(b["qs"])

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_2bit(codes)


class Q3_K(
    GroupedBlock, type=T.Q3_K, size=SUPER, tile=1024, importance="twice", group=16, levels=(-4, 3),
    hmask=(u1, 32), qs=(u1, 64), scales=(u1, 12), d=f2,
):  # fmt: skip
    """3-bit levels; 16 groups of 16 with 6-bit signed scales: 3.4375 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = as_groups(x, 16)
        fit: DescentFit | SymmetricFit
        if w is None:
            fit = DescentFit(groups, 4)
            codes, d = round_signed(per_block(fit.scale, 16))
        else:
            weights = as_groups(w, 16, "weights")
            fit = SymmetricFit(groups, 4, weights)
            of_scales = SymmetricFit(per_block(fit.scale, 16), 32, per_block(add_up(weights), 16), "scales ")
            codes = of_scales.levels(np.arange(len(x))).astype(np.uint8)
            d = of_scales.scale.astype(np.float16)
        packed = np.empty((12, len(x)), np.uint8)
        low, high = codes & u8(15), codes >> u8(4)
        packed[:8] = low[:8] | low[8:] << u8(4)
        packed[8:] = high[0:4] | high[4:8] << u8(2) | high[8:12] << u8(4) | high[12:16] << u8(6)
        out["d"], out["scales"] = d, packed.T
        step = per_group(d.astype(np.float32) * (codes.astype(np.float32) - f32(32)))
        Q3_K.put_codes(round_levels(groups, step, -4, 3, fit, shift=4, finite=w is None).reshape(-1, SUPER), out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[NDArray[np.int8], None]:
        s = b["scales"]
        low = np.concatenate([s[:, :8] & u8(15), s[:, :8] >> u8(4)], axis=1)
        high = np.concatenate([s[:, 8:] >> shift & u8(3) for shift in (0, 2, 4, 6)], axis=1)
        return (low | high << 4).astype(np.int8) - np.int8(32), None

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        high_bits = np.unpackbits(b["hmask"].reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, SUPER)
        return unpack_2bit(b["qs"]) | high_bits << u8(2)

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        codes = codes.reshape(-1, SUPER)
        out["hmask"] = pack_1bit(codes >> u8(2))
        out["qs"] = pack_2bit(codes & u8(3))


def round_signed(scale: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """Scales (16, n) as integers 0..63, where 32 is zero, and the fp16 step; all 0 if all scales are."""
    top = first_extreme(scale)
    some = top != 0
    inverse = np.divide(f32(-32), np.where(some, top, f32(1)), dtype=np.float32)
    codes = (np.clip(nearest_int(inverse * scale), -32, 31) + 32) * some
    return codes.astype(np.uint8), np.where(some, f32(1) / inverse, f32(0)).astype(np.float16)


def first_extreme(scale: Floats) -> Floats:
    """The scale of largest magnitude of each super-block, the first of equals; (groups, n) -> (n,)."""
    return extreme(scale)


def encode_affine_32(x: Floats, w: Floats | None, out: Blocks, nmax: int, first: float, steps: int) -> Bytes:
    """What Q4_K and Q5_K share: fills d, dmin and scales, returns the levels, shape (n, 256)."""
    groups = as_groups(x, 32)
    if w is None:
        weights = scratch("weights", groups.shape)
        average = np.sqrt(add_up(np.square(groups, out=weights)) / f32(32))
        np.add(np.abs(groups, out=weights), average, out=weights)
        fit, of_groups = AffineFit(groups, weights, nmax, first, 0.1, steps), None
    else:
        fit = AffineFit(groups, as_groups(w, 32, "weights"), nmax, *FINE)
        of_groups = per_block(fit.sum_w, 8)
    s, d = round_scales(per_block(fit.scale, 8), of_groups, 63)
    m, dmin = round_scales(per_block(fit.minimum, 8), of_groups, 63)
    out["d"], out["dmin"], out["scales"] = d, dmin, pack_6bit(s, m)
    step = per_group(d.astype(np.float32) * s)
    offset = per_group(dmin.astype(np.float32) * m)
    levels = round_levels(groups, step, 0, nmax, fit, offset=offset, finite=w is None)
    return levels.reshape(-1, SUPER)


class Affine32(GroupedBlock, abstract=True):
    """What Q4_K and Q5_K share: how scales and minimums are stored."""

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Bytes, Bytes]:
        return unpack_6bit(b["scales"])


class Q4_K(
    Affine32, type=T.Q4_K, size=SUPER, tile=1024, weighted_tile=1024, importance="twice",
    group=32, levels=(0, 15), offset="dmin", d=f2, dmin=f2, scales=(u1, 12), qs=(u1, 128),
):  # fmt: skip
    """4-bit levels; 8 groups of 32 with 6-bit scales and minimums: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        Q4_K.put_codes(encode_affine_32(x, w, out, 15, -1.0, 20), out)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        q = b["qs"].reshape(-1, 4, 1, 32)
        codes: Bytes = np.concatenate([q & u8(15), q >> u8(4)], axis=2).reshape(-1, SUPER)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = fold(codes.reshape(-1, 64), 4).reshape(-1, 128)


class Q5_K(
    Affine32, type=T.Q5_K, size=SUPER, tile=512, weighted_tile=1024, importance="twice",
    group=32, levels=(0, 31), offset="dmin", d=f2, dmin=f2, scales=(u1, 12), qh=(u1, 32), qs=(u1, 128),
):  # fmt: skip
    """5-bit levels; 8 groups of 32 with 6-bit scales and minimums: 5.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        Q5_K.put_codes(encode_affine_32(x, w, out, 31, -0.5, 15), out)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        q = b["qs"].reshape(-1, 4, 1, 32)
        high = np.unpackbits(b["qh"].reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, 4, 2, 32)
        codes: Bytes = (np.concatenate([q & u8(15), q >> u8(4)], axis=2) | high << u8(4)).reshape(-1, SUPER)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        out["qs"] = fold((codes & u8(15)).reshape(-1, 64), 4).reshape(-1, 128)
        out["qh"] = pack_1bit(codes.reshape(-1, SUPER) >> u8(4))


class Q6_K(
    GroupedBlock, type=T.Q6_K, size=SUPER, tile=512, importance="plain", group=16, levels=(-32, 31),
    ql=(u1, 128), qh=(u1, 64), scales=(i1, 16), d=f2,
):  # fmt: skip
    """6-bit levels; 16 groups of 16 with 8-bit signed scales: 6.5625 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = as_groups(x, 16)
        fit = SymmetricFit(groups, 32, None if w is None else as_groups(w, 16, "weights"))
        scale = per_block(fit.scale, 16)
        top = first_extreme(scale)
        zero = np.abs(top) < GROUP_MAX_EPS
        inverse = np.divide(f32(-128), np.where(zero, f32(1), top), dtype=np.float32)
        codes = np.minimum(nearest_int(inverse * scale), 127)
        codes[:, zero] = 0
        d = np.where(zero, f32(0), f32(1) / inverse).astype(np.float16)
        out["d"], out["scales"] = d, codes.T
        step = per_group(d.astype(np.float32) * codes.astype(np.float32))
        levels = round_levels(groups, step, -32, 31, fit, shift=32, finite=w is None).reshape(-1, SUPER)
        levels[zero] = 0
        Q6_K.put_codes(levels, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[NDArray[np.int8], None]:
        return b["scales"], None

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        ql = b["ql"].reshape(-1, 2, 1, 2, 32)
        low = np.concatenate([ql & u8(15), ql >> u8(4)], axis=2).reshape(-1, 2, 4, 32)
        high = b["qh"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & u8(3)
        codes: Bytes = (low | high << u8(4)).reshape(-1, SUPER)
        return codes

    @staticmethod
    def put_codes(codes: Bytes, out: Blocks) -> None:
        halves = np.ascontiguousarray(codes).reshape(-1, 128)
        out["ql"] = fold(halves & u8(15), 4).reshape(-1, 128)
        high = halves.view(np.uint64) >> np.uint64(4) & np.uint64(0x0303030303030303)
        out["qh"] = fold(fold(high.view(np.uint8), 4), 2).reshape(-1, 64)
