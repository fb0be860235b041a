"""Slabs: the pieces in which a plan is executed, and the act of filling one.

A slab is some rows of one tensor, small enough that memory stays flat however large the model is. A slab is read,
encoded and written by one worker, which opens its own files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.base import REGISTRY
from gguforge.quant.cache import Cache
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.errors import DataError, GGUForgeError
from gguforge.quant.files import Writeback, copy_range, write_at
from gguforge.quant.inputs import Inputs
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import Bytes

ENCODE_SLAB = 1 << 19  # elements: 2 MiB of float32, and about five times that in temporaries
CACHED_SLAB = 1 << 22  # elements of one entry of the cache: a large model has thousands of them and not millions
COPY_SLAB = 1 << 22  # bytes


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows `start:stop` of tensor number `index`."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of a slab.

    Attributes:
        nbytes: its bytes.
        cached: whether they came from the cache; None for a mere copy, which does not ask it.
    """

    nbytes: int
    cached: bool | None


def slabs(plan: Plan, cached: bool = False) -> Iterator[Slab]:
    """The work of a plan, in file order; with a cache, what is encoded comes in larger slabs."""
    encoded_slab = CACHED_SLAB if cached else ENCODE_SLAB
    for index, tensor in enumerate(plan.tensors):
        step = max(
            1,
            COPY_SLAB // max(1, tensor.row_bytes) if tensor.is_copy else encoded_slab // max(1, tensor.row_length),
        )
        matrix = tensor.rows_per_matrix
        for first in range(0, tensor.rows if tensor.row_length else 0, max(1, matrix)):
            end = first + matrix  # a slab has one importance: it ends where a matrix ends
            for start in range(first, end, step):
                yield Slab(index, start, min(end, start + step))


def end(plan: Plan, slab: Slab) -> int:
    """The byte of the file behind a slab."""
    return len(plan.header) + plan.offsets[slab.index] + slab.stop * plan.tensors[slab.index].row_bytes


def unfinished(plan: Plan, begin: int, cached: bool = False) -> list[Slab]:
    """The slabs that do not end at or before byte `begin` of the file."""
    return [slab for slab in slabs(plan, cached) if end(plan, slab) > begin]


class Filler:
    """One worker's open files, and the act of filling a slab of a plan into a part file.

    Args:
        plan, part: what to write, and where.
        begin: what ends at or before this byte of the file is done.
        cache: where encoded rows are looked up and kept.
    """

    def __init__(self, plan: Plan, part: Path, begin: int = 0, cache: Cache | None = None) -> None:
        self.plan, self.data_offset, self.cache = plan, len(plan.header), cache
        self.work = unfinished(plan, begin, cache is not None)
        self.target = os.open(part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        self.writeback = Writeback(self.target)
        self.inputs = Inputs()

    def close(self) -> None:
        """Close the files."""
        self.writeback.close()
        self.inputs.close()
        os.close(self.target)

    def do(self, number: int) -> Filled:
        """Write slab `number`."""
        slab = self.work[number]
        tensor = self.plan.tensors[slab.index]
        offset = self.data_offset + self.plan.offsets[slab.index] + slab.start * tensor.row_bytes
        nbytes = (slab.stop - slab.start) * tensor.row_bytes
        cached = None
        with naming(tensor):
            if tensor.is_copy:
                self._copy(tensor, slab, offset, nbytes)
            else:
                data, cached = self._encoded(tensor, slab)
                write_at(self.target, offset, data.data)
            self.writeback.start(offset, nbytes)
        return Filled(nbytes, cached)

    def _encoded(self, tensor: TensorPlan, slab: Slab) -> tuple[Bytes, bool]:
        """A slab's bytes, and whether they come from the cache."""
        if self.cache is None:
            return encoded(tensor, slab.start, self.inputs.rows(tensor.source, slab.start, slab.stop)), False
        key = self.cache.key(tensor, slab.start, slab.stop)
        found = self.cache.fetch(key, (slab.stop - slab.start) * tensor.row_bytes)
        if found is not None:
            return found, True
        step = max(1, ENCODE_SLAB // tensor.row_length)
        parts = []
        for start in range(slab.start, slab.stop, step):
            rows = self.inputs.rows(tensor.source, start, min(slab.stop, start + step))
            parts.append(encoded(tensor, start, rows))
        data = np.concatenate(parts)
        self.cache.store(key, data)
        return data, False

    def _copy(self, tensor: TensorPlan, slab: Slab, offset: int, nbytes: int) -> None:
        rows = tensor.source.raw_rows(slab.start, slab.stop)
        if tensor.type in REGISTRY and not block_type(tensor.type).is_finite(rows):
            raise not_finite(tensor, "holds NaN or infinity")
        extent = tensor.source.extent
        if extent is None:
            write_at(self.target, offset, np.ascontiguousarray(rows).data)
            return
        source = self.inputs.descriptor(extent.path)
        copy_range(source, extent.offset + slab.start * tensor.row_bytes, self.target, offset, nbytes)


def encoded(tensor: TensorPlan, start: int, rows: Bytes) -> Bytes:
    """Rows of one matrix in the tensor's type.

    Args:
        tensor: what they are rows of.
        start: the number of the first one.
        rows: as they are stored, shape (rows, bytes per row).

    Raises:
        DataError: NaN or infinity, or values too large for the type.
    """
    kind, stored = block_type(tensor.type), block_type(tensor.source.type)
    if stored.size > 1:
        rows, stored = stored.decode(rows).view(np.uint8), block_type(GGMLQuantizationType.F32)
    weights = None if tensor.importance is None else tensor.importance[start // tensor.rows_per_matrix]
    if not (kind.shows_nan and weights is None) and not stored.is_finite(rows):
        raise not_finite(tensor, "holds NaN or infinity")
    data = kind.encode_stored(rows, stored, weights)
    if not kind.is_finite(data):
        what = f"values too large for {tensor.type.name}" if stored.is_finite(rows) else "NaN or infinity"
        raise not_finite(tensor, f"holds {what}")
    return data


def not_finite(tensor: TensorPlan, what: str) -> DataError:
    """The error for numbers that no block can hold."""
    paths = tensor.source.paths
    return DataError(
        what, path=paths[0] if paths else None, remedy="The checkpoint is damaged or diverged in training."
    )


@contextmanager
def naming(tensor: TensorPlan) -> Iterator[None]:
    """Errors say which tensor they are about."""
    try:
        yield
    except GGUForgeError as error:
        error.tensor = error.tensor or tensor.name
        raise
