"""Hand-made GGUF bytes, sound or not: nothing here checks anything, which is the point."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q4_K, I8 = 0, 1, 2, 12, 24  # ggml types


def u32(*numbers: int) -> bytes:
    return b"".join(struct.pack("<I", number & 0xFFFFFFFF) for number in numbers)


def u64(*numbers: int) -> bytes:
    return b"".join(struct.pack("<Q", number & 0xFFFFFFFFFFFFFFFF) for number in numbers)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string, with a length that may lie."""
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes, length: int | None = None) -> bytes:
    """A metadata pair; `length` is what the key claims."""
    return text(key, length) + u32(kind) + value


def array(key: str, item: int, count: int, data: bytes = b"") -> bytes:
    """A metadata pair with an array."""
    return pair(key, ARRAY, u32(item) + u64(count) + data)


def tensor(
    name: str | bytes = "a",
    dimensions: Sequence[int] = (8,),
    kind: int = F32,
    offset: int = 0,
    length: int | None = None,
    n_dimensions: int | None = None,
) -> bytes:
    """A tensor's entry; dimensions as on disk, row length first."""
    count = len(dimensions) if n_dimensions is None else n_dimensions
    return text(name, length) + u32(count) + u64(*dimensions) + u32(kind) + u64(offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int | bytes = 0,
    align: int = 32,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_pairs: int | None = None,
) -> bytes:
    """A file; `data` is the data section, or its length in zero bytes."""
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    if tensors:
        head += bytes(-len(head) % align)
    return head + (bytes(data) if isinstance(data, int) else data)
