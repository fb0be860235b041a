"""The 3-bit types on grids of 4 weights: IQ3_XXS, IQ3_S.

Equal `quantize_row_iq3_*_impl` and `dequantize_row_iq3_*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Blocks, Floats, f2, u1, u4
from gguforge.quant.blocks.iq import Kind, nibbles, pack_pairs, search, seven_and_four, seven_of, signed, squares
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import f32
from gguforge.quant.search.grids import grid

TILE = 256
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class IQ3_XXS(
    Block, type=T.IQ3_XXS, size=256, tile=TILE, weighted_tile=TILE, importance="twice",
    d=f2, qs=(u1, 64), signs=(u4, 8),
):  # fmt: skip
    """256 grid points, signs of even parity; 8 groups of 32 with 4-bit scales: 3.0625 bpw."""

    KIND = Kind("IQ3_XXS", 32, range(-15, 16), 0.2, 1e-8, even=True, again="off points")

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        found = search(x, squares(x) if w is None else w, IQ3_XXS.KIND)
        out["d"] = (found.d * f32(1.0125)).astype(np.float16)
        out["qs"], out["signs"] = found.index.astype(np.uint8), seven_and_four(found.signs, found.scale)
        for field in ("qs", "signs"):
            out[field][found.empty] = 0

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        scales = (b["signs"] >> np.uint32(28)).astype(np.float32)
        step = b["d"].astype(np.float32)[:, None] * (f32(0.5) + scales) * f32(0.5)
        points = grid("IQ3_XXS").points[b["qs"]].reshape(-1, 8, 32)
        return signed(step[..., None] * points, seven_of(b["signs"])).reshape(-1, 256)


class IQ3_S(
    Block, type=T.IQ3_S, size=256, tile=TILE, weighted_tile=TILE, importance="twice",
    d=f2, qs=(u1, 64), qh=(u1, 8), signs=(u1, 32), scales=(u1, 4),
):  # fmt: skip
    """512 grid points, free signs; 8 groups of 32 with 4-bit scales: 3.4375 bpw.

    After a group of 32 zeros ggml writes the rest of a super-block 8 bytes too early, so that it reads back as noise.
    Here every group is in its place: the one deliberate difference.
    """

    KIND = Kind("IQ3_S", 32, range(-9, 10), 0.2, SMALLEST, even=False, again="off groups")

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        found = search(x, squares(x) if w is None else w, IQ3_S.KIND)
        out["d"], out["scales"] = (found.d * f32(1.033)).astype(np.float16), pack_pairs(found.scale)
        out["qs"], out["signs"] = found.index.astype(np.uint8), found.signs
        out["qh"] = np.packbits(found.index > 255, axis=1, bitorder="little")

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        high = np.unpackbits(b["qh"], axis=1, bitorder="little").astype(np.int16)
        step = b["d"].astype(np.float32)[:, None] * (1 + 2 * nibbles(b["scales"]).astype(np.float32))
        points = grid("IQ3_S").points[b["qs"] | high << 8].reshape(-1, 8, 32)
        return signed(step[..., None] * points, b["signs"]).reshape(-1, 256)
