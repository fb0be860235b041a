"""Where a tensor's elements come from: a byte range of a file, or an array in memory.

A source gives a tensor in three ways, cheapest first: as one byte range that the kernel can copy, as rows of stored
bytes, and as rows of float32. Transforming sources (permute, split, stack...) wrap another one and live with the
checkpoints that need them, in `gguforge.convert.operations`. Sources are small and picklable: worker processes open
their own files.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks import decode
from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguforge.quant.errors import InputError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Extent:
    """A byte range of a file."""

    path: str
    offset: int
    nbytes: int


class Source(ABC):
    """A tensor to be read row by row; the last axis is the row, all others together number the rows.

    Attributes:
        shape: NumPy order, at least one axis.
        type: how the elements are stored.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @abstractmethod
    def raw_rows(self, start: int, stop: int) -> Bytes:
        """Stored bytes of rows `start:stop`, shape (stop - start, bytes per row); read-only."""

    @property
    def extent(self) -> Extent | None:
        """The byte range that holds the whole tensor in output order, if there is one."""
        return None

    @property
    def paths(self) -> tuple[str, ...]:
        """The files it reads."""
        return ()

    @property
    def stored(self) -> Source:
        """The elements as they were stored: of a source that encodes, the one that it reads."""
        return self

    def rows(self, start: int, stop: int) -> Floats:
        """Rows `start:stop` as float32, shape (stop - start, row length); read-only."""
        return decode(self.raw_rows(start, stop), self.type)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block_size * block_bytes


@dataclass(frozen=True)
class FileSource(Source):
    """A tensor that lies contiguous in a file, at `offset` bytes from its start."""

    path: str
    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def extent(self) -> Extent:
        return Extent(self.path, self.offset, prod(self.shape[:-1]) * self.row_bytes)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def raw_rows(self, start: int, stop: int) -> Bytes:
        window = map_window(self.path, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        return window.reshape(stop - start, self.row_bytes)


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """A float32 array in memory, for small generated tensors (rope factors)."""

    array: Floats

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.array.shape

    @property
    def type(self) -> GGMLQuantizationType:  # type: ignore[override]
        return GGMLQuantizationType.F32

    def raw_rows(self, start: int, stop: int) -> Bytes:
        rows = np.ascontiguousarray(self.array, "<f4").reshape(-1, self.shape[-1])
        return rows[start:stop].view(np.uint8).copy()


def map_window(path: str, offset: int, nbytes: int) -> Bytes:
    """Bytes `offset:offset + nbytes` of a file as a memory map that lives as long as the array.

    Small windows keep the resident memory flat: a map of the whole file would count every page ever touched. The size
    is checked each time, since touching a page past the end of a file kills the process.

    Raises:
        InputError: the file is shorter than that.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if offset + nbytes > size:
            raise InputError(
                "file is cut short",
                path=path,
                expected=f"at least {offset + nbytes} bytes",
                found=f"{size} bytes",
            )
        if nbytes == 0:
            return np.empty(0, np.uint8)
        lead = offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(file.fileno(), lead + nbytes, access=mmap.ACCESS_READ, offset=offset - lead)
    return np.frombuffer(mapped, np.uint8, nbytes, lead)
