"""The header of a safetensors file: where every tensor lies. Tensor data is not read.

The rules are those of the official validator, and stricter in one point: a tensor named twice is refused. Everything
is checked in Python ints before it is used, so a crafted header costs no more than an honest one of its size.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from gguforge.quant.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 16  # a million factors of 2^63 would take minutes to multiply

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of every dtype that the format knows."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        name: its name in the checkpoint.
        dtype: the format's name of the element type.
        shape: row length last; () for a scalar.
        path: the file it lies in.
        offset: bytes from the start of that file.
        nbytes: bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, sorted by name.

    Raises:
        CheckpointError: the file breaks a rule of the format, is cut short, or is no regular file.
        OSError: it cannot be opened.
    """
    header, _, data_start, size = _read_header(path)
    entries = [_entry(path, name, value, data_start) for name, value in header.items()]
    _check_layout(path, entries, data_start, size)
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def read_metadata(path: Path) -> dict[str, str]:
    """The remarks in a safetensors file's header (`__metadata__`); errors as `read_safetensors`."""
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """The header's entries, its metadata, the offset at which data starts, and the file's size."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError("this is not a regular file", path=path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _damaged(
                path, "file ends inside its header", f"{8 + length} bytes" if size >= 8 else "8 bytes", f"{size} bytes"
            )
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, "header is too long", f"at most {MAX_HEADER_BYTES} bytes", f"{length} bytes")
        text = file.read(length)
    header, metadata = _parse(path, text)
    return header, metadata, 8 + length, size


def _damaged(
    path: Path, what: str, expected: object = None, found: object = None, tensor: str | None = None
) -> CheckpointError:
    remedy = "The file is damaged or not safetensors: download it again."
    return CheckpointError(what, path=path, tensor=tensor, expected=expected, found=found, remedy=remedy)


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's JSON and its metadata, refused where Python's json is more lenient than the format."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _damaged(path, "header names a key twice", found=repr(twice))
        return table

    def no_float(number: str) -> NoReturn:
        raise _damaged(path, "header holds a number that is no integer", found=number[:40])

    if text[:1] != b"{":
        raise _damaged(path, "header is no JSON object", found=repr(text[:8]))
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_float=no_float, parse_constant=no_float
        )
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "header is not JSON", found=str(error)[:80]) from None
    if len(header) > MAX_TENSORS:
        raise _damaged(path, "too many tensors", f"at most {MAX_TENSORS}", len(header))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ is not a table of strings")
    assert isinstance(header, dict)
    return header, metadata


def _entry(path: Path, name: str, value: object, data_start: int) -> StoredTensor:
    """One header entry, its own fields checked."""
    if not _is_sound_name(name):
        raise _damaged(
            path, "tensor name is not allowed", f"1 to {MAX_NAME_BYTES} bytes of printable UTF-8", repr(name[:60])
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, "header entry is malformed", "dtype, shape, data_offsets", tensor=name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, "unknown dtype", found=repr(dtype)[:40], tensor=name)
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, "shape or offsets are malformed", "non-negative integers", tensor=name)
    if len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, "too many dimensions", f"at most {MAX_DIMENSIONS}", len(shape), name)
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise _damaged(path, "shape and offsets disagree", f"{bits / 8:g} bytes", f"{end - begin} bytes", name)
    return StoredTensor(name, dtype, tuple(shape), str(path), data_start + begin, end - begin)


def _is_sound_name(name: str) -> bool:
    """Short, printable and encodable: it goes into messages and tables, never into a path."""
    try:
        return 0 < len(name.encode("utf-8")) <= MAX_NAME_BYTES and name.isprintable()
    except UnicodeEncodeError:
        return False


def _are_counts(value: object) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1 (true is 1 in Python, hence the exact type)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(path: Path, entries: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors fill the file from the header's end to the last byte, without hole or overlap."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            fault = "overlaps another tensor" if entry.offset < position else "leaves a hole before it"
            raise _damaged(path, fault, f"offset {position}", f"offset {entry.offset}", entry.name)
        position += entry.nbytes
    if position != size:
        fault = "file is cut short" if position > size else "bytes follow the last tensor"
        raise _damaged(path, fault, f"{position} bytes", f"{size} bytes")
