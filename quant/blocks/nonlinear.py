"""The 4-bit types whose levels are a table of values: IQ4_NL, IQ4_XS.

Equal `quantize_iq4_*` and `dequantize_row_iq4_*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats, f2, u1
from gguforge.quant.blocks.kquants import per_block, per_group
from gguforge.quant.blocks.legacy import pack_nibbles, reciprocal, unpack_nibbles
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import as_groups, extreme, f32, nearest_int, scratch
from gguforge.quant.search.table import TABLE, TableFit, nearest

SIZE = 32
u8 = np.uint8


def fit_groups(x: Floats, w: Floats | None) -> tuple[Floats, Floats]:
    """Blocks as columns of 32, shape (32, groups), and the scale of each, shape (groups,)."""
    groups = as_groups(x, SIZE)
    weights = np.square(groups, out=scratch("weights", groups.shape)) if w is None else as_groups(w, SIZE, "weights")
    return groups, TableFit(groups, weights).scale


def pack_levels(levels: Bytes) -> Bytes:
    """Levels 0..15, shape (32, groups), two to a byte: (groups, 16)."""
    return pack_nibbles(np.ascontiguousarray(levels.T))


class IQ4_NL(Block, type=T.IQ4_NL, size=SIZE, tile=2048, weighted_tile=2048, importance="scaled", d=f2, qs=(u1, 16)):
    """4-bit table levels: 4.5 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups, scale = fit_groups(x, w)
        out["d"], out["qs"] = scale.astype(np.float16), pack_levels(nearest(groups, reciprocal(scale)))

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return b["d"].astype(np.float32)[:, None] * TABLE[unpack_nibbles(b["qs"])]


class IQ4_XS(
    Block, type=T.IQ4_XS, size=256, tile=256, weighted_tile=256, importance="scaled",
    d=f2, scales_h="<u2", scales_l=(u1, 4), qs=(u1, 128),
):  # fmt: skip
    """4-bit table levels; 8 groups of 32 with 6-bit signed scales: 4.25 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        groups, scale = fit_groups(x, w)
        scales = per_block(scale, 8)
        d = -extreme(scales) / f32(32)
        codes = nearest_int(reciprocal(d) * scales)
        codes.clip(-32, 31, out=codes)
        step = per_group(d * codes.astype(np.float32))
        out["d"] = d.astype(np.float16)
        out["qs"] = pack_levels(nearest(groups, reciprocal(step))).reshape(-1, 128)
        stored = (codes.T + 32).astype(np.uint8)
        low, high = stored & u8(15), stored.astype(np.uint16) >> 4
        out["scales_l"] = low[:, 0::2] | low[:, 1::2] << u8(4)
        out["scales_h"] = np.bitwise_or.reduce(high << (2 * np.arange(8, dtype=np.uint16)), axis=1)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        low = np.stack([b["scales_l"] & u8(15), b["scales_l"] >> u8(4)], axis=2).reshape(-1, 8)
        high = b["scales_h"][:, None] >> (2 * np.arange(8, dtype=np.uint16)) & 3
        step = b["d"].astype(np.float32)[:, None] * ((low | high << 4).astype(np.int8) - 32)
        values = TABLE[unpack_nibbles(b["qs"].reshape(-1, 16))].reshape(-1, 8, SIZE)
        return (step[..., None] * values).reshape(-1, 256)
