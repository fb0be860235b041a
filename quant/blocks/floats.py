"""The unquantized types: F32, F16, BF16. A block is one element."""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats, f2
from gguforge.quant.constants import GGMLQuantizationType as T

TILE = 1 << 16


class F32(Block, type=T.F32, size=1, tile=TILE, value="<f4"):
    """IEEE single precision."""

    @staticmethod
    def encode_blocks(x: Floats, out: Blocks) -> None:
        out["value"] = x[:, 0]

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return b["value"][:, None]


class F16(Block, type=T.F16, size=1, tile=TILE, value=f2):
    """IEEE half precision, rounded to nearest, ties to even."""

    @staticmethod
    def encode_blocks(x: Floats, out: Blocks) -> None:
        out["value"] = x[:, 0]

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return b["value"][:, None]


class BF16(Block, type=T.BF16, size=1, tile=TILE, value="<u2"):
    """The upper half of single precision, rounded to nearest, ties to even; a NaN stays one (quiet)."""

    @staticmethod
    def encode_blocks(x: Floats, out: Blocks) -> None:
        bits = x[:, 0].view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            rounded = np.where(nan, bits >> 16 | 64, rounded)
        out["value"] = rounded

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return (b["value"].astype(np.uint32) << 16).view(np.float32)[:, None]

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        exponents = np.ascontiguousarray(data).view(np.uint8).reshape(-1).view("<u2") & 0x7F80
        return not exponents.size or bool(exponents.max() < 0x7F80)
