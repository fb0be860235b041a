"""The unquantized types: F32, F16, BF16. A block is one element."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Block, Bytes, Floats, f2
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import f32, scratch

u32 = np.uint32
TILE = 1 << 16  # elements cast at once: few enough for the cache


class Plain(Block, abstract=True):
    """What the unquantized types share: elements are cast in flat tiles.

    Attributes:
        infinity: the word that stands for it; those of larger magnitude are no numbers.
    """

    infinity: ClassVar[int]

    @classmethod
    def encode(cls, rows: Floats, weights: Floats | None = None) -> Bytes:
        x = np.ascontiguousarray(rows, np.float32).reshape(-1)
        out = np.empty(x.size, cls.layout["value"])
        with np.errstate(over="ignore"):
            for start in range(0, x.size, TILE):
                cls.from_float(x[start : start + TILE], out[start : start + TILE])
        return out.view(np.uint8).reshape(*rows.shape[:-1], rows.shape[-1] * cls.layout.itemsize)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        values = np.ascontiguousarray(data).reshape(-1).view(cls.layout["value"])
        out = np.empty(values.size, np.float32)
        for start in range(0, values.size, TILE):
            cls.to_float(values[start : start + TILE], out[start : start + TILE])
        return out.reshape(*data.shape[:-1], data.shape[-1] // cls.layout.itemsize)

    @classmethod
    def is_finite(cls, data: NDArray[Any]) -> bool:
        nbytes = cls.layout.itemsize
        words = np.ascontiguousarray(data).reshape(-1).view(f"<u{nbytes}")
        if not words.size:
            return True
        sign = 1 << 8 * nbytes - 1
        return int(words.view(f"<i{nbytes}").max()) < cls.infinity and int(words.max()) < sign + cls.infinity

    @staticmethod
    def from_float(x: Floats, out: Any) -> None:
        """Elements in the type's own form, into `out`."""
        out[...] = x

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        out[...] = values


class F32(Plain, type=T.F32, size=1, value="<f4"):
    """IEEE single precision."""

    infinity = 0x7F800000


class F16(Plain, type=T.F16, size=1, value=f2):
    """IEEE half precision, rounded to nearest, ties to even.

    NumPy casts one number after the other. Here the arithmetic of float32 does the work, for many at once; only NaN,
    and on the way back infinity, are left to NumPy.
    """

    infinity = 0x7C00

    @staticmethod
    def from_float(x: Floats, out: Any) -> None:
        if np.isnan(x.max()):
            out[...] = x
            return
        word, half = x.view(np.uint32), np.abs(x, out=scratch("half", x.shape))
        half *= f32(2.0**112)  # what is too large for a half becomes infinite
        half *= f32(2.0**-110)
        power = scratch("power", x.shape)
        np.bitwise_and(word, u32(0x7F800000), out=power.view(np.uint32))  # the power of two in x, at least 2^-14
        power.clip(f32(2.0**-14), f32(np.inf), out=power)
        half += np.multiply(power, f32(2.0**15), out=power)  # rounds: what lies 12 places below the power is cut off
        bits, sign = half.view(np.uint32), power.view(np.uint32)
        mantissa = np.bitwise_and(bits, u32(0xFFF), out=scratch("mantissa", x.shape).view(np.uint32))
        bits >>= u32(13)
        bits &= u32(0x7C00)
        bits += mantissa  # a mantissa of 12 bits adds one to the exponent
        np.right_shift(word, u32(16), out=sign)
        sign &= u32(0x8000)
        out.view("<u2")[...] = np.bitwise_or(bits, sign, out=bits)

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        if not F16.is_finite(values):
            out[...] = values
            return
        bits = out.view(np.int32)
        bits[...] = values.view("<i2")
        bits <<= 13  # exponent and mantissa where float32 has them, and copies of the sign
        bits &= np.int32(-0x70000001)
        out *= f32(2.0**112)  # the other bias; the small ones without a leading one are right as well


class BF16(Plain, type=T.BF16, size=1, value="<u2"):
    """The upper half of single precision, rounded to nearest, ties to even; a NaN stays one (quiet)."""

    infinity = 0x7F80

    @staticmethod
    def from_float(x: Floats, out: Any) -> None:
        word = x.view(np.uint32)
        bits = np.right_shift(word, u32(16), out=scratch("bits", x.shape).view(np.uint32))
        bits &= u32(1)
        bits += u32(0x7FFF)
        bits += word
        bits >>= u32(16)
        if np.isnan(x.max()):
            bits[...] = np.where(np.isnan(x), word >> u32(16) | u32(64), bits)
        out[...] = bits

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        bits = out.view(np.uint32)
        bits[...] = values
        bits <<= 16
