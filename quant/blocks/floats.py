"""The unquantized types: F32, F16, BF16. A block is one element."""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Bytes, Floats, f2
from gguforge.quant.constants import GGMLQuantizationType as T

TILE = 1 << 13  # elements cast at once: temporaries stay in the cache and below the size that malloc maps afresh
CHECKED = 1 << 15  # 16-bit elements looked at at once, likewise


class Plain(Block, abstract=True):
    """What the unquantized types share: elements are cast in flat tiles."""

    @classmethod
    def encode(cls, rows: Floats, weights: Floats | None = None) -> Bytes:
        x = np.ascontiguousarray(rows, np.float32).reshape(-1)
        out = np.empty(x.size, cls.layout["value"])
        with np.errstate(over="ignore"):
            for start in range(0, x.size, TILE):
                out[start : start + TILE] = cls.from_float(x[start : start + TILE])
        return out.view(np.uint8).reshape(*rows.shape[:-1], -1)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        values = np.ascontiguousarray(data).reshape(-1).view(cls.layout["value"])
        out = np.empty(values.size, np.float32)
        for start in range(0, values.size, TILE):
            cls.to_float(values[start : start + TILE], out[start : start + TILE])
        return out.reshape(*data.shape[:-1], -1)

    @staticmethod
    def from_float(x: Floats) -> Any:
        """Elements in the type's own form."""
        raise NotImplementedError

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        """The inverse, without loss, into `out`."""
        out[...] = values


class F32(Plain, type=T.F32, size=1, value="<f4"):
    """IEEE single precision."""

    @staticmethod
    def from_float(x: Floats) -> Any:
        return x


class F16(Plain, type=T.F16, size=1, value=f2):
    """IEEE half precision, rounded to nearest, ties to even."""

    @staticmethod
    def from_float(x: Floats) -> Any:
        return x.astype(f2)

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        return exponents_below(data, 0x7C00)


class BF16(Plain, type=T.BF16, size=1, value="<u2"):
    """The upper half of single precision, rounded to nearest, ties to even; a NaN stays one (quiet)."""

    @staticmethod
    def from_float(x: Floats) -> Any:
        bits = x.view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            rounded = np.where(nan, bits >> 16 | 64, rounded)
        return rounded

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        bits = out.view(np.uint32)
        bits[...] = values
        bits <<= 16

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        return exponents_below(data, 0x7F80)


def exponents_below(data: Bytes, mask: int) -> bool:
    """Whether no 16-bit float has all exponent bits of `mask` set, which stands for infinity and NaN."""
    bits = np.ascontiguousarray(data).reshape(-1).view("<u2")
    exponents = np.empty(CHECKED, np.uint16)
    for start in range(0, bits.size, CHECKED):
        tile = bits[start : start + CHECKED]
        if np.bitwise_and(tile, np.uint16(mask), out=exponents[: tile.size]).max() == mask:
            return False
    return True
