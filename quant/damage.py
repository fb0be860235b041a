"""What each block type costs each tensor: the weighted squared error of some of its rows, relative to the tensor.

The errors of one tensor in different types are comparable; how much a tensor matters to the model they do not tell:
that is measured (`gguforge.runtime.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gguforge.quant.blocks import block_type, decode, encode
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.plan import TensorPlan
from gguforge.quant.sources import Floats

SAMPLE = 1 << 18  # elements
STRIPES = 8  # places of the tensor that the sample is taken from


def relative_errors(tensor: TensorPlan, types: Iterable[T], sample: int = SAMPLE) -> dict[T, float]:
    """Sum of w * (x - quantized x)^2 over sum of w * x^2, for each type whose blocks divide the rows.

    Args:
        tensor: its source, and the importance w of its columns if it has one.
        types: block types; those that need an importance which the tensor has not are left out.
        sample: elements to look at.
    """
    found = dict.fromkeys(types, 0.0)
    total = 0.0
    for kind in list(found):
        unfit = tensor.row_length % GGML_QUANT_SIZES[kind][0] != 0
        if unfit or (tensor.importance is None and block_type(kind).required):
            del found[kind]
    for rows, weights in _stripes(tensor, sample):
        w = np.float32(1) if weights is None else weights
        total += float(np.sum(w * np.square(rows), dtype=np.float64))
        for kind in found:
            error = rows - decode(encode(rows, kind, weights), kind)
            found[kind] += float(np.sum(w * np.square(error), dtype=np.float64))
    return {kind: error / total if total else 0.0 for kind, error in found.items()}


def _stripes(tensor: TensorPlan, sample: int) -> Iterable[tuple[Floats, Floats | None]]:
    """Some rows from all over the tensor with their importance, a stripe at a time."""
    wanted = max(STRIPES, sample // max(1, tensor.row_length))
    if tensor.rows <= wanted:
        starts, height = list(range(0, tensor.rows, tensor.rows_per_matrix)), tensor.rows_per_matrix
    else:
        height = max(1, min(wanted // STRIPES, tensor.rows_per_matrix))
        starts = [int(start) for start in np.linspace(0, tensor.rows - height, STRIPES)]
    for start in starts:
        matrix = start // tensor.rows_per_matrix
        stop = min(start + height, (matrix + 1) * tensor.rows_per_matrix)  # a stripe has one importance
        yield tensor.source.rows(start, stop), None if tensor.importance is None else tensor.importance[matrix]
