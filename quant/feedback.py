"""Error feedback: a matrix is quantized so that its outputs change little, given how its inputs go together.

With the second moments H = E[x x^T] of the inputs, the mean squared error of the outputs is tr(D H D^T), D being what
quantizing changed. Two steps make it small, inside the block type that the plan chose:

1. Columns left to right, each one first corrected for the errors of those before it (GPTQ, arXiv:2210.17323, in the
   form of arXiv:2307.13304: H = (U + I) diag (U + I)^T needs one Cholesky factorization and no inverse). The scales of
   each block (256 columns; 32 of legacy types) are searched on the corrected weights.
2. Descent on the same error (`gguforge.quant.descent`): scales and minimums of groups, `d` and `dmin`, and single
   levels take turns, each moving to what is best with all others held still. At 2 bits it halves what step 1 leaves.

It does not run models: `gguforge.runtime.tune` brings the moments. Matrices are columns first, (columns, rows).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.base import Bytes, Floats
from gguforge.quant.blocks.fields import LEGACY, RANGES, Fields, pack, range_of, unpack
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.descent import descend
from gguforge.quant.search.base import f32
from gguforge.quant.search.refine import importance, refine

DAMPING = 0.01  # of the mean of H's diagonal, added to it: directions that the text never showed still count
SHARE = 0.5  # of a correction that is made: it was fitted to the calibration text, and all of it does less elsewhere
TOGETHER = 0.8  # of how columns go together that is believed where it was not measured on real text
PART = 32  # columns corrected one by one; what they change beyond is added up in one product
ROWS = 2048  # worked on at a time

Moments = NDArray[np.float32]


def damped(moments: NDArray[np.floating]) -> Moments:
    """Moments that can be inverted; columns that were never excited count as little as possible."""
    found = moments.astype(np.float32)
    mean = float(found.diagonal().mean())
    found[np.diag_indices_from(found)] += f32(DAMPING * mean if mean > 0 else 1.0)
    return found


def with_importance(moments: NDArray[np.floating], importance: Floats) -> Moments:
    """Moments whose diagonal is the importance of the columns, and which go together as these do, though less.

    Args:
        moments: of inputs that are no real text, shape (columns, columns).
        importance: mean squares of the real inputs, shape (columns,).
    """
    found = moments.astype(np.float32)
    diagonal = found.diagonal()
    scale = np.sqrt(np.divide(importance, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0))
    found = f32(TOGETHER) * found * scale[:, None] * scale
    found[np.diag_indices_from(found)] = importance
    return found


def corrected(weights: Floats, moments: Moments, shift: NDArray[np.floating]) -> Floats:
    """The weights that make up, half and as far as the inputs allow, for a given change of the wanted outputs.

    Args:
        weights: shape (rows, columns).
        moments: damped second moments of the inputs x as they are now, shape (columns, columns).
        shift: E[(wanted - present output) x^T], shape (rows, columns).

    Returns:
        weights + SHARE * shift * moments^-1: least squares, held near `weights` by the damping.
    """
    change = np.linalg.solve(moments.astype(np.float64), shift.T.astype(np.float64)).T
    return (weights + SHARE * change).astype(np.float32)


def encode_with_feedback(weights: Floats, moments: Moments, type: GGMLQuantizationType) -> Bytes:
    """Quantize a matrix with error feedback; types that are not evenly spaced take the diagonal as importance.

    Args:
        weights: shape (rows, columns), finite.
        moments: damped second moments of the inputs, shape (columns, columns).
        type: the block type.

    Returns:
        shape (rows, bytes per row).
    """
    kind = block_type(type)
    if type not in RANGES and type not in LEGACY:
        return kind.encode(weights, np.ascontiguousarray(moments.diagonal()))
    pull, importances = feedback_of(moments)
    parts = []
    for start in range(0, len(weights), ROWS):
        columns = np.ascontiguousarray(weights[start : start + ROWS].T, np.float32)
        fields = _columns_in_order(columns, pull, importances, type)
        descend(columns, moments, fields)
        blocks = np.stack([pack(field) for field in fields], axis=1)  # (rows, blocks of a row)
        parts.append(np.ascontiguousarray(blocks).view(np.uint8).reshape(columns.shape[1], -1))
    return np.concatenate(parts)


def feedback_of(moments: Moments) -> tuple[Floats, Floats]:
    """How much of a column's error the columns after it take over, and what is left of the column's importance.

    Returns:
        U + I, where H = (U + I) diag (U + I)^T, shape (columns, columns), and the diagonal, shape (columns,).
    """
    lower = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))
    upper = lower[::-1, ::-1]
    root = upper.diagonal().copy()
    return (upper / root).astype(np.float32), np.square(root).astype(np.float32)


def _columns_in_order(x: Floats, pull: Floats, importances: Floats, type: GGMLQuantizationType) -> list[Fields]:
    """The first step: the blocks of all rows, one `Fields` for each block of a row; `x` is (columns, rows)."""
    found: list[Fields] = []
    errors = np.zeros_like(x)
    width = range_of(type).width
    for start in range(0, len(x), width):
        here = slice(start, start + width)
        wanted = x[here] + pull[:start, here].T @ errors[:start]
        fields = _search(wanted, importances[here], type)
        _round_in_order(x[here], wanted, pull[here, here], fields, errors[here])
        found.append(fields)
    return found


def _search(x: Floats, importances: Floats, type: GGMLQuantizationType) -> Fields:
    """Scales for blocks (width, rows), by the importance that feedback leaves to each column."""
    kind = block_type(type)
    columns = importances / importances.mean()
    blocks = kind.encode(np.ascontiguousarray(x.T), columns).reshape(-1).view(kind.layout)
    if type in LEGACY:
        return unpack(blocks, type)
    return refine(x, importance(x, columns[:, None], known=True), unpack(blocks, type))


def _round_in_order(x: Floats, wanted: Floats, pull: Floats, fields: Fields, errors: Floats) -> None:
    """Levels of one block a row, with feedback inside it; `wanted` is used up, `errors` filled in."""
    range, step, offset = fields.range, fields.step, fields.offset
    inverse = np.divide(f32(1), step, out=np.zeros_like(step), where=step != 0)
    for first in np.arange(0, range.width, PART):
        part = slice(first, first + PART)
        for column in np.arange(first, first + PART):
            group = column // range.size
            level = np.rint((wanted[column] + offset[group]) * inverse[group])
            fields.level[column] = np.clip(level, *range.level, out=level)
            errors[column] = x[column] - (step[group] * level - offset[group])
            wanted[column + 1 : first + PART] += pull[column, column + 1 : first + PART, None] * errors[column]
        wanted[first + PART :] += pull[part, first + PART :].T @ errors[part]
