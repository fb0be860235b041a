"""GGUF metadata values: a value with the type it has on disk, and its bytes.

The value's type is part of the format's contract (llama.cpp looks a key up by type), so it is never guessed from the
Python value. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from gguforge.quant.constants import GGUFValueType

Scalar = bool | int | float | str

STRUCT_CODES: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
"""The `struct` code of every value type of fixed size; strings and arrays have a length of their own."""


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value.

    Attributes:
        kind: the type on disk.
        value: the Python value; a list for an array. Strings that are not UTF-8 carry their raw bytes as surrogate
            escapes, so that writing gives back the bytes that were read.
        item: the type of an array's elements, None for a scalar.
    """

    kind: GGUFValueType
    value: Scalar | list[Scalar]
    item: GGUFValueType | None = None

    def pack(self) -> bytes:
        """The value as it stands in a file: type, then for arrays element type and count, then the data."""
        head = struct.pack("<I", self.kind)
        if self.item is None:
            assert not isinstance(self.value, list)
            return head + _pack_scalar(self.kind, self.value)
        assert isinstance(self.value, list)
        return head + struct.pack("<IQ", self.item, len(self.value)) + _pack_items(self.item, self.value)


def pack_string(text: str) -> bytes:
    """Length (u64) and bytes of a string.

    >>> pack_string("gguf").hex()
    '040000000000000067677566'
    """
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pack_scalar(kind: GGUFValueType, value: Scalar) -> bytes:
    if kind == GGUFValueType.STRING:
        assert isinstance(value, str)
        return pack_string(value)
    return struct.pack("<" + STRUCT_CODES[kind], value)


def _pack_items(item: GGUFValueType, values: list[Scalar]) -> bytes:
    if item == GGUFValueType.STRING:
        return b"".join(map(pack_string, values))  # type: ignore[arg-type]
    return struct.pack(f"<{len(values)}{STRUCT_CODES[item]}", *values)


def uint32(value: int) -> Value:
    """An unsigned 32-bit number: counts, sizes, token ids."""
    return Value(GGUFValueType.UINT32, value)


def int32(value: int) -> Value:
    """A signed 32-bit number."""
    return Value(GGUFValueType.INT32, value)


def float32(value: float) -> Value:
    """A 32-bit float: epsilons, frequencies, sampling settings."""
    return Value(GGUFValueType.FLOAT32, value)


def boolean(value: bool) -> Value:
    """A truth value."""
    return Value(GGUFValueType.BOOL, value)


def string(value: str) -> Value:
    """A string."""
    return Value(GGUFValueType.STRING, value)


def array(item: GGUFValueType, values: Iterable[Scalar]) -> Value:
    """An array whose elements all have the type `item`."""
    return Value(GGUFValueType.ARRAY, list(values), item)
