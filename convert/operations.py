"""Sources that change a stored tensor on its way into the output: the vocabulary of operations.

Each streams by rows, opens its own files and can be pickled, so any worker can run any part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.sources import Bytes, FileSource, Source, map_window

CAST_DTYPES = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2",
    "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
"""NumPy dtypes of the stored element types that GGUF weights cannot have; they are read as float32."""

WINDOW = 1 << 22  # bytes of a stored matrix that are mapped at once to gather columns


@dataclass(frozen=True)
class CastToFloat(Source):
    """A tensor stored in a file as float64 or integers, rounded to float32."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    type = GGMLQuantizationType.F32

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def raw_rows(self, start: int, stop: int) -> Bytes:
        dtype = np.dtype(self.dtype)
        row = self.shape[-1] * dtype.itemsize
        stored = map_window(self.path, self.offset + start * row, (stop - start) * row)
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, as in a C cast; the writer reports it
            return stored.view(dtype).astype("<f4").view(np.uint8).reshape(stop - start, -1)


@dataclass(frozen=True)
class Rearranged(Source):
    """A stored tensor whose elements come in another order."""

    base: FileSource | CastToFloat

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def type(self) -> GGMLQuantizationType:  # type: ignore[override]
        return self.base.type

    @property
    def paths(self) -> tuple[str, ...]:
        return self.base.paths


@dataclass(frozen=True)
class PermuteHeads(Rearranged):
    """Query or key rows in the order of llama.cpp's interleaved rope, from Hugging Face's half-split one.

    Hugging Face rotates element i of a head with element i + d/2; llama.cpp's `llama` graph rotates 2i with 2i + 1.
    Output row 2j + k of a head is therefore stored row k*d/2 + j. A bias has one element where a weight has a row.

    Args:
        base: the stored tensor, shape (heads * d, ...).
        heads: number of heads.
    """

    heads: int

    def raw_rows(self, start: int, stop: int) -> Bytes:
        if len(self.shape) == 1:  # one row that holds the whole bias
            (row,) = self.base.raw_rows(0, 1)
            elements = row.reshape(self.shape[0], -1)  # (elements, bytes of one)
            permuted: Bytes = elements[self.stored_rows(0, self.shape[0])].reshape(1, -1)[start:stop]
            return permuted
        head = self.shape[0] // self.heads
        first, last = start // head * head, -(-stop // head) * head  # the whole heads that hold these rows
        return self.base.raw_rows(first, last)[self.stored_rows(start, stop) - first]

    def stored_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The stored row of every output row `start:stop`.

        >>> PermuteHeads(FileSource("w", 0, (8, 1), GGMLQuantizationType.F32), heads=2).stored_rows(0, 8).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
        """
        d = self.shape[0] // self.heads
        row = np.arange(start, stop)
        head, within = row // d, row % d
        return head * d + within % 2 * (d // 2) + within // 2


@dataclass(frozen=True)
class Transpose(Rearranged):
    """A matrix stored with its columns as rows, as GPT-2's `Conv1D` layers are.

    Output rows are stored columns, so every stored row is visited for them, in windows that are let go one by one:
    memory stays flat, and the file is read as often as there are slabs of output rows.

    Args:
        base: the stored tensor, shape (columns, rows).
    """

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape[::-1]

    def raw_rows(self, start: int, stop: int) -> Bytes:
        columns, rows = self.base.shape
        dtype = np.dtype(f"u{self.row_bytes // columns}")
        found = np.empty((stop - start, columns), dtype)
        step = max(1, WINDOW // (rows * dtype.itemsize))
        for first in range(0, columns, step):
            window = self.base.raw_rows(first, min(first + step, columns)).view(dtype)
            found[:, first : first + step] = window[:, start:stop].T
        return found.view(np.uint8)


@dataclass(frozen=True)
class SkipRows(Rearranged):
    """A stored tensor without its first `count` rows, such as a position table that begins with unused positions."""

    count: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.base.shape[0] - self.count, *self.base.shape[1:])

    def raw_rows(self, start: int, stop: int) -> Bytes:
        return self.base.raw_rows(start + self.count, stop + self.count)
