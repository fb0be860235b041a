"""How errors of the token embedding show: through the matrices of the first block, which read it.

A row of the embedding is normalized, scaled column by column and multiplied by the first stage's matrices W. Errors e
of a row change their outputs by W G e, G being the gain of each column, so what counts is e^T (sum G W^T W G) e: many
directions of a row hardly show at all. The gains are measured, so no norm is written down here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Floats

OTHERS = 0.3
"""Weight of all directions alike, for what else reads the embedding: later blocks, and the head where it is tied."""


def embedding_moments(rows: Floats, inputs: Floats, matrices: Sequence[Floats]) -> NDArray[np.float32]:
    """What takes the place of the inputs' moments when the embedding is encoded with feedback.

    Args:
        rows: embedding rows of some text, shape (tokens, width).
        inputs: what the first stage's matrices read of them, same shape.
        matrices: those matrices, shape (rows of the matrix, width) each.

    Returns:
        shape (width, width), mean of the diagonal 1 + OTHERS.
    """
    size = np.square(rows).mean(axis=1, keepdims=True)
    relative = np.square(rows) / np.where(size > 0, size, 1)
    gains = np.sqrt(np.square(inputs).mean(axis=0) / np.maximum(relative.mean(axis=0), 1e-12))
    seen = sum((_visible(matrix, inputs) for matrix in matrices), np.zeros((rows.shape[1],) * 2, np.float32))
    seen *= gains[:, None] * gains
    seen *= np.float32(1 / seen.diagonal().mean())
    return seen + np.float32(OTHERS) * np.eye(len(seen), dtype=np.float32)


def _visible(matrix: Floats, inputs: Floats) -> Floats:
    """W^T W, relative to the size of the matrix's outputs."""
    energy = np.square(inputs @ matrix.T).sum(axis=1).mean()
    found: Floats = matrix.T @ matrix / energy
    return found
