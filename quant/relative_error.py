"""The relative error of a written tensor: how far its weights, decoded again, are from those that it was made from.

RMS(decoded - source) / RMS(source), in float64, on rows from all over the tensor. The rows depend on the shape alone
and are read from the finished file, so the number is the same with any number of workers, resumed or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from gguforge.quant.blocks import decode
from gguforge.quant.errors import InputError
from gguforge.quant.files import read_at
from gguforge.quant.inputs import Inputs
from gguforge.quant.lossless import is_lossless
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import FileSource, Floats, Source

SAMPLE = 1 << 13  # weights of one tensor: in a hundredth of the time that its fastest encoder takes
LEAST = 4  # rows, however long
PLACES = 16  # where the rows are taken from, evenly spread


def relative_errors(plan: Plan, path: Path) -> tuple[float | None, ...]:
    """The relative error of every tensor of a file that was written by a plan; see `relative_error`."""
    starts = [len(plan.header) + offset for offset in plan.offsets]
    with closing(Inputs()) as inputs:
        return tuple(
            relative_error(tensor, str(path), start, inputs) for tensor, start in zip(plan.tensors, starts, strict=True)
        )


def relative_error(tensor: TensorPlan, path: str, offset: int, inputs: Inputs) -> float | None:
    """RMS(decoded - source) / RMS(source) of one tensor, to four significant digits.

    Args:
        tensor: its type, and the source of its weights; of a source that encodes, the weights that it reads.
        path, offset: where its blocks lie.
        inputs: open files.

    Returns:
        0 for a mere copy, and for weights that lie on a grid and were written on it; None where the source is all
        zeros on these rows and the tensor is not.
    """
    source = tensor.source
    if is_lossless(tensor) or (tensor.is_copy and source.stored is source) or not tensor.elements:
        return 0.0
    while source.stored is not source:
        source = source.stored
    weights = _sample(source, inputs).astype(np.float64)
    error = float(np.square(_sample(FileSource(path, offset, tensor.shape, tensor.type), inputs) - weights).sum())
    total = float(np.square(weights).sum())
    if not total:
        return None if error else 0.0
    return float(f"{math.sqrt(error / total):.3e}")


def _sample(source: Source, inputs: Inputs) -> Floats:
    """Rows from all over a tensor as float32, shape (rows, row length)."""
    stripes = list(_stripes(math.prod(source.shape[:-1]), source.shape[-1]))
    size, extent, filled = source.row_bytes, source.extent, 0
    data = np.empty(sum(stop - start for start, stop in stripes) * size, np.uint8)
    for start, stop in stripes:
        part = data[filled : filled + (stop - start) * size]
        filled += part.size
        if extent is None:
            part[:] = source.raw_rows(start, stop).reshape(-1)
        elif read_at(inputs.descriptor(extent.path), extent.offset + start * size, part.data) < part.size:
            raise InputError("file is cut short", path=extent.path)
    return decode(data.reshape(-1, size), source.type)


def _stripes(rows: int, row_length: int) -> Iterator[tuple[int, int]]:
    """Rows `start:stop` in the middle of each of some equal parts of a tensor; all rows, if they are few."""
    wanted = max(LEAST, SAMPLE // row_length)
    if rows <= wanted:
        yield 0, rows
        return
    places = min(PLACES, wanted)
    height = wanted // places
    for place in range(places):
        begin, end = place * rows // places, (place + 1) * rows // places
        start = begin + (end - begin - height) // 2
        yield start, start + height
