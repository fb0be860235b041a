"""The 4-bit floating point types: MXFP4 (power-of-two scales) and NVFP4 (8-bit floating point scales).

Levels are E2M1 numbers, kept doubled: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives; scales are halved in turn. Equal
`quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref` and their inverses of ggml/src/ggml-quants.c; the number formats:
OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats, Kind, u1
from gguforge.quant.blocks.floats import F32
from gguforge.quant.blocks.lanes import (
    Words,
    as_codes,
    as_lanes,
    halves,
    largest,
    magnitudes,
    per_lane,
    put_lanes,
    signs,
    u4,
)
from gguforge.quant.blocks.legacy import numbers, pack_nibbles, unpack_nibbles
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import f32, scratch

u8 = np.uint8

E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
HALFWAY = ((E2M1[1:8].astype(np.float32) + E2M1[:7]) / 2).tolist()  # 0.5, 1.5, ..., 10
FAR = 12 * 2.0**20  # times the scale: beyond it distances to levels lose bits
INVALID = 255  # E8M0 for "not a number"


def nearest_e2m1(x: Floats, d: Floats) -> Bytes:
    """Codes 0..15 of the numbers nearest to x / d, of two equally near the smaller; shape of x; `d` is (n, 1)."""
    size, t = np.abs(x), scratch("t", x.shape)
    steps = scratch("steps", x.shape)
    steps[...] = np.where(d == 0, np.inf, d)  # in full: comparing with a column at a time takes twice as long
    codes = np.zeros(x.shape, np.uint8)
    for middle in HALFWAY:
        codes += size > np.multiply(steps, f32(middle), out=t)
    far = np.nonzero(size > np.multiply(steps, f32(FAR), out=t))
    if len(far[0]):  # rounded, the distances to several levels may be equal: C takes the first
        levels = E2M1[:8].astype(np.float32)
        codes[far] = np.abs(steps[far][:, None] * levels - size[far][:, None]).argmin(axis=1)
    codes += ((x < 0) & (codes > 0)) * u8(8)
    return codes


def signed_e2m1(doubled: Bytes, negative: NDArray[np.int8]) -> Bytes:
    """Codes of numbers: from twice their magnitudes, rounded up, at most 32, and their signs."""
    codes = (doubled.view(u4) >> np.uint32(1) & np.uint32(0x7F7F7F7F)).view(np.uint8)
    np.minimum(codes, np.full(codes.shape[1], 4, np.uint8), out=codes)  # a scalar is slow
    for middle in HALFWAY[4:]:
        codes += doubled > u8(2 * middle)
    below = (codes > 0).view(u4) & negative.view(u4)
    below <<= np.uint32(3)
    found = codes.view(u4)
    found |= below
    return codes


def half_of_e8m0(e: Bytes) -> Floats:
    """2^(e - 128), e = 0..255."""
    e32 = e.astype(np.uint32)
    halves: Floats = np.where(e32 < 2, 0x200000 << np.minimum(e32, 1), (e32 - 1) << 23).astype(np.uint32).view("f4")
    return halves


class MXFP4(Block, type=T.MXFP4, size=32, tile=8192, e=u1, qs=(u1, 16)):
    """4-bit floats with a power-of-two scale: 4.25 bpw."""

    @classmethod
    def encode_blocks(cls, x: Floats, w: Floats | None, out: Blocks) -> None:
        cls.encode_words(x.view(u4), F32, out)

    @classmethod
    def encode_words(cls, words: Words, stored: Kind, out: Blocks) -> None:
        lanes = as_lanes(words)
        negative = signs(lanes)
        magnitudes(lanes, out=lanes)
        top = numbers(largest(lanes), stored, "peak")
        # In double precision, rounded to single as C's log2f: it may round up to the next power of two.
        log = np.log2(top.astype(np.float64)).astype(np.float32)
        exponent = np.floor(np.where(top > 0, log, f32(0))).astype(np.int32) + (127 - 2)
        out["e"] = np.where(top > 0, exponent & 255, 0)
        usual = (exponent >= 8) & (exponent <= 250)  # 2^(129 - e) is an ordinary number
        if not (usual | (top == 0)).all():
            x = numbers(words, stored, "few")
            out["qs"] = pack_nibbles(nearest_e2m1(x, half_of_e8m0(out["e"])[:, None]))
            return
        inverse = np.where(top > 0, 256 - exponent << 23, 0).astype(np.uint32).view(np.float32)
        t = numbers(lanes, stored, "numbers")
        t *= per_lane(inverse)
        put_lanes(halves(signed_e2m1(as_codes(np.ceil(t, out=t)), negative)), out["qs"])

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return E2M1[unpack_nibbles(b["qs"])] * half_of_e8m0(b["e"])[:, None]

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1).view(cls.layout)
        return not bool((blocks["e"] == INVALID).any())


def to_ue4m3(x: Floats) -> Bytes:
    """Positive float32 as an unsigned float of 4 exponent and 3 mantissa bits, rounded half up, at most 448; else 0."""
    bits = np.minimum(x, f32(448)).view(np.uint32)
    exponent = (bits >> 23).astype(np.int32) - 127 + 7
    rounded = (exponent << 3 | (bits >> 20 & 7).astype(np.int32)) + (bits >> 19 & 1).astype(np.int32)
    small = np.minimum((x * f32(512) + f32(0.5)).astype(np.int32), 7)  # units of 2^-9, below the normal numbers
    codes = np.where(exponent > 0, np.minimum(rounded, 0x7E), small)
    return np.where(x > 0, codes, 0).astype(np.uint8)


def half_of_ue4m3(codes: Bytes) -> Floats:
    """Half of the number that a code stands for; the code of "not a number", 127, gives 0."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    normal = np.ldexp(f32(1) + mantissa / f32(8), exponent - 8)
    values: Floats = np.where(exponent > 0, normal, np.ldexp(mantissa, -10))
    return np.where(codes == 0x7F, f32(0), values)


class NVFP4(Block, type=T.NVFP4, size=64, d=(u1, 4), qs=(u1, 32)):
    """4-bit floats; 4 groups of 16 with 8-bit float scales: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups = x.reshape(-1, 16)
        codes = to_ue4m3(np.abs(groups).max(axis=1) / f32(6))
        levels = nearest_e2m1(groups, half_of_ue4m3(codes)[:, None])
        out["d"] = codes.reshape(-1, 4)
        out["qs"] = (levels[:, :8] | levels[:, 8:] << u8(4)).reshape(-1, 32)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        q = b["qs"].reshape(-1, 4, 8)
        values = E2M1[np.concatenate([q & u8(15), q >> u8(4)], axis=2)]
        return (values * half_of_ue4m3(b["d"])[..., None]).reshape(-1, 64)
