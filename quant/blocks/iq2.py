"""The 2-bit types on grids of 8 weights: IQ2_XXS, IQ2_XS, IQ2_S.

Equal `quantize_row_iq2_*_impl` and `dequantize_row_iq2_*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Blocks, Floats, block_mean, f2, u1, u4
from gguforge.quant.blocks.iq import (
    Kind,
    nibbles,
    pack_pairs,
    search,
    seven_and_four,
    seven_of,
    signed,
    with_parity,
)
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import GROUP_MAX_EPS, f32
from gguforge.quant.search.grids import grid

TILE = 512
EPS = float(GROUP_MAX_EPS)


class IQ2_XXS(
    Block, type=T.IQ2_XXS, size=256, tile=TILE, weighted_tile=TILE, importance="block", required=True,
    d=f2, qs=(u4, 16),
):  # fmt: skip
    """256 grid points, signs of even parity; 8 groups of 32 with 4-bit scales: 2.0625 bpw."""

    KIND = Kind("IQ2_XXS", 32, range(-6, 7), 0.1, EPS, even=True, again="all", first=True)

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        assert w is not None
        found = search(x, w, IQ2_XXS.KIND)
        out["d"] = found.d.astype(np.float16)
        out["qs"][:, 0::2] = found.index.astype(np.uint8).view("<u4")
        out["qs"][:, 1::2] = seven_and_four(found.signs, found.scale)
        out["qs"][found.empty] = 0

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        words = np.ascontiguousarray(b["qs"][:, 1::2])
        index = np.ascontiguousarray(b["qs"][:, 0::2]).view(np.uint8)
        step = b["d"].astype(np.float32)[:, None] * (f32(0.5) + (words >> 28).astype(np.float32)) * f32(0.25)
        points = grid("IQ2_XXS").points[index].reshape(-1, 8, 32)
        return signed(step[..., None] * points, seven_of(words)).reshape(-1, 256)


def steps_of_16(b: Blocks) -> Floats:
    """The scales of IQ2_XS and IQ2_S: shape (n, 16, 1)."""
    step = b["d"].astype(np.float32)[:, None] * (f32(0.5) + nibbles(b["scales"]).astype(np.float32)) * f32(0.25)
    return step[..., None]


class IQ2_XS(
    Block, type=T.IQ2_XS, size=256, tile=TILE, weighted_tile=TILE, importance="block", required=True,
    d=f2, qs=("<u2", 32), scales=(u1, 8),
):  # fmt: skip
    """512 grid points, signs of even parity; 16 groups of 16 with 4-bit scales: 2.3125 bpw."""

    KIND = Kind("IQ2_XS", 16, range(-9, 10), 0.1, EPS, even=True, again="off points")

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        assert w is not None
        found = search(x, w, IQ2_XS.KIND)
        out["d"], out["scales"] = found.d.astype(np.float16), pack_pairs(found.scale)
        out["qs"] = found.index.astype(np.uint16) | found.signs.astype(np.uint16) << np.uint16(9)
        out["qs"][found.empty] = 0

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        points = grid("IQ2_XS").points[b["qs"] & 511].reshape(-1, 16, 16)
        return signed(steps_of_16(b) * points, with_parity(b["qs"] >> np.uint16(9))).reshape(-1, 256)


class IQ2_S(
    Block, type=T.IQ2_S, size=256, tile=TILE, weighted_tile=TILE, importance="twice",
    d=f2, qs=(u1, 32), signs=(u1, 32), qh=(u1, 8), scales=(u1, 8),
):  # fmt: skip
    """1024 grid points, free signs; 16 groups of 16 with 4-bit scales: 2.5625 bpw."""

    KIND = Kind("IQ2_S", 16, range(-9, 10), 0.1, 1e-8, even=False, again="off points")

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        if w is None:
            w = np.square(x)
            w += f32(0.25) * block_mean(w, "twice")[:, None]
        found = search(x, w, IQ2_S.KIND)
        out["d"], out["scales"] = (found.d * f32(0.9875)).astype(np.float16), pack_pairs(found.scale)
        out["qs"], out["signs"] = found.index.astype(np.uint8), found.signs
        high = (found.index >> 8).astype(np.uint8).reshape(-1, 8, 4)
        out["qh"] = np.bitwise_or.reduce(high << np.array([0, 2, 4, 6], np.uint8), axis=2)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        high = b["qh"][..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        index = b["qs"] | high.reshape(-1, 32).astype(np.int16) << 8
        points = grid("IQ2_S").points[index].reshape(-1, 16, 16)
        return signed(steps_of_16(b) * points, b["signs"]).reshape(-1, 256)
