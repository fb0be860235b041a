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
from gguforge.quant.blocks.packing import (
    as_columns,
    as_rows,
    as_words,
    join,
    lower,
    pack_2bit_columns,
    pack_4bit_columns,
    pack_6bit,
    pack_16_6bit,
    u8,
    unpack_1bit,
    unpack_2bit,
    unpack_4bit,
    unpack_6bit,
    unpack_16_6bit,
)
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.affine import AffineFit
from gguforge.quant.search.base import (
    GROUP_MAX_EPS,
    add_up,
    as_groups,
    byte_scratch,
    extreme,
    f32,
    nearest_int,
    round_into,
    scratch,
)
from gguforge.quant.search.descent import DescentFit
from gguforge.quant.search.positive import PositiveFit
from gguforge.quant.search.symmetric import SymmetricFit

SUPER = 256
FINE = (-0.9, 0.05, 36)  # the candidates of AffineFit where the importance is known


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
        shape (size, groups), values low + shift .. high + shift, in working memory.
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
    codes = byte_scratch("codes", x.shape)
    np.copyto(codes.view(np.int8), level, casting="unsafe")
    if shift:
        codes += u8(shift)
    if len(keep):
        codes[:, keep] = fit.levels(keep)
    return codes


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


class KQuant(GroupedBlock, abstract=True):
    """What the k-quants share: groups have integer scales, and levels are packed as columns."""

    @staticmethod
    def put_scales(scale: NDArray[Any], minimum: NDArray[Any] | None, out: Blocks) -> None:
        """The inverse of `scales`, but of columns: fills in integers of shape (groups, n)."""
        raise NotImplementedError

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        """Fill in the levels of `out` (n blocks) from codes of shape (group, n * groups)."""
        raise NotImplementedError

    @classmethod
    def put_codes(cls, codes: Bytes, out: Blocks) -> None:
        cls.put_columns(as_columns(codes, cls.group), out)


class Q2_K(
    KQuant, type=T.Q2_K, size=SUPER, tile=1024, weighted_tile=1024, importance="block",
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
        out["d"], out["dmin"] = d, dmin
        Q2_K.put_scales(s, m, out)
        step = per_group(d.astype(np.float32) * s)
        offset = per_group(dmin.astype(np.float32) * m)
        Q2_K.put_columns(round_levels(groups, step, 0, 3, fit, offset=offset, finite=w is None), out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Bytes, Bytes]:
        return b["scales"] & u8(15), b["scales"] >> u8(4)

    @staticmethod
    def put_scales(scale: Bytes, minimum: Bytes | None, out: Blocks) -> None:
        assert minimum is not None
        out["scales"] = (scale | minimum << 4).T

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_2bit(b["qs"])

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_2bit_columns(codes, len(out))


class Q3_K(
    KQuant, type=T.Q3_K, size=SUPER, tile=1024, importance="twice", group=16, levels=(-4, 3),
    hmask=(u1, 32), qs=(u1, 64), scales=(u1, 12), d=f2,
):  # fmt: skip
    """3-bit levels; 16 groups of 16 with 6-bit signed scales: 3.4375 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = as_groups(x, 16)
        fit: DescentFit | SymmetricFit
        if w is None:
            fit = DescentFit(groups, 4)
            scale, d = round_signed(per_block(fit.scale, 16))
        else:
            weights = as_groups(w, 16, "weights")
            fit = SymmetricFit(groups, 4, weights)
            scales = per_block(fit.scale, 16)
            of_scales = SymmetricFit(scales, 32, per_block(add_up(weights), 16), "scales ")
            scale = of_scales.levels(np.arange(len(x))).astype(np.int8) - np.int8(32)
            d = of_scales.scale.astype(np.float16)
            d[np.isnan(scales).any(axis=0)] = np.nan  # as in C, where the sums of a group are infinite
        out["d"] = d
        Q3_K.put_scales(scale, None, out)
        step = per_group(d.astype(np.float32) * scale)
        Q3_K.put_columns(round_levels(groups, step, -4, 3, fit, shift=4, finite=w is None), out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[NDArray[np.int8], None]:
        return unpack_16_6bit(b["scales"]).astype(np.int8) - np.int8(32), None

    @staticmethod
    def put_scales(scale: NDArray[np.int8], minimum: Bytes | None, out: Blocks) -> None:
        out["scales"] = pack_16_6bit((scale + np.int8(32)).view(np.uint8))

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_2bit(b["qs"]) | unpack_1bit(b["hmask"]) << u8(2)

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_2bit_columns(codes, len(out))
        halves = lower(join(as_words(codes, 1, 2), 1, 2, 4), 2).view("<u4")  # four bits to a byte, the half it lies in
        both = halves | halves >> np.uint32(12)
        out["hmask"] = as_rows(both.astype("<u2").view(np.uint8), len(out))


def round_signed(scale: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Scales (16, n) as integers -32..31, and the fp16 step; all -32 and 0 if all scales are 0."""
    top = extreme(scale)
    some = top != 0
    inverse = np.divide(f32(-32), np.where(some, top, f32(1)), dtype=np.float32)
    codes = nearest_int(inverse * scale).clip(-32, 31)
    codes[:, ~some] = -32
    return codes.astype(np.int8), np.where(some, f32(1) / inverse, f32(0)).astype(np.float16)


def encode_affine_32(x: Floats, w: Floats | None, out: Blocks, nmax: int, first: float, steps: int) -> Bytes:
    """What Q4_K and Q5_K share: fills d, dmin and scales, returns the levels, shape (32, 8 * n)."""
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
    out["d"], out["dmin"] = d, dmin
    Affine32.put_scales(s, m, out)
    step = per_group(d.astype(np.float32) * s)
    offset = per_group(dmin.astype(np.float32) * m)
    return round_levels(groups, step, 0, nmax, fit, offset=offset, finite=w is None)


class Affine32(KQuant, abstract=True):
    """What Q4_K and Q5_K share: how scales and minimums are stored."""

    @classmethod
    def scales(cls, b: Blocks) -> tuple[Bytes, Bytes]:
        return unpack_6bit(b["scales"])

    @staticmethod
    def put_scales(scale: Bytes, minimum: Bytes | None, out: Blocks) -> None:
        assert minimum is not None
        out["scales"] = pack_6bit(scale, minimum)


class Q4_K(
    Affine32, type=T.Q4_K, size=SUPER, tile=1024, weighted_tile=1024, importance="twice",
    group=32, levels=(0, 15), offset="dmin", d=f2, dmin=f2, scales=(u1, 12), qs=(u1, 128),
):  # fmt: skip
    """4-bit levels; 8 groups of 32 with 6-bit scales and minimums: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        Q4_K.put_columns(encode_affine_32(x, w, out, 15, -1.0, 20), out)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_4bit(b["qs"])

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_4bit_columns(codes, len(out))


class Q5_K(
    Affine32, type=T.Q5_K, size=SUPER, tile=512, weighted_tile=1024, importance="twice",
    group=32, levels=(0, 31), offset="dmin", d=f2, dmin=f2, scales=(u1, 12), qh=(u1, 32), qs=(u1, 128),
):  # fmt: skip
    """5-bit levels; 8 groups of 32 with 6-bit scales and minimums: 5.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        Q5_K.put_columns(encode_affine_32(x, w, out, 31, -0.5, 15), out)

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        return unpack_4bit(b["qs"]) | unpack_1bit(b["qh"]) << u8(4)

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        out["qs"] = pack_4bit_columns(codes, len(out))
        out["qh"] = as_rows(lower(join(as_words(codes, 1, 4), 1, 1, 2, 4), 1), len(out))


class Q6_K(
    KQuant, type=T.Q6_K, size=SUPER, tile=512, importance="plain", group=16, levels=(-32, 31),
    ql=(u1, 128), qh=(u1, 64), scales=(i1, 16), d=f2,
):  # fmt: skip
    """6-bit levels; 16 groups of 16 with 8-bit signed scales: 6.5625 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = as_groups(x, 16)
        fit = SymmetricFit(groups, 32, None if w is None else as_groups(w, 16, "weights"))
        scale = per_block(fit.scale, 16)
        top = extreme(scale)
        zero = np.abs(top) < GROUP_MAX_EPS
        inverse = np.divide(f32(-128), np.where(zero, f32(1), top), dtype=np.float32)
        codes = np.minimum(nearest_int(inverse * scale), 127)
        codes[:, zero] = 0
        d = np.where(zero, f32(0), f32(1) / inverse).astype(np.float16)
        out["d"] = d
        Q6_K.put_scales(codes, None, out)
        step = per_group(d.astype(np.float32) * codes.astype(np.float32))
        levels = round_levels(groups, step, -32, 31, fit, shift=32, finite=w is None)
        levels.reshape(16, -1, 16)[:, zero] = 0
        Q6_K.put_columns(levels, out)

    @classmethod
    def scales(cls, b: Blocks) -> tuple[NDArray[np.int8], None]:
        return b["scales"], None

    @staticmethod
    def put_scales(scale: NDArray[Any], minimum: Bytes | None, out: Blocks) -> None:
        out["scales"] = scale.T

    @staticmethod
    def codes(b: Blocks) -> Bytes:
        ql = b["ql"].reshape(-1, 2, 1, 2, 32)
        low = np.concatenate([ql & u8(15), ql >> u8(4)], axis=2).reshape(-1, 2, 4, 32)
        high = b["qh"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & u8(3)
        codes: Bytes = (low | high << u8(4)).reshape(-1, SUPER)
        return codes

    @staticmethod
    def put_columns(codes: Bytes, out: Blocks) -> None:
        out["ql"] = as_rows(lower(join(as_words(codes, 15), 4, 4), 4), len(out))
        out["qh"] = pack_2bit_columns(codes, len(out), shift=4)
