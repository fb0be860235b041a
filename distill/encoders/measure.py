"""What an encoder is worth on text it never saw: its hidden words, and its embeddings beside the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.batches import Batch
from gguforge.distill.encoders.pooling import Pooling, pooled
from gguforge.distill.objective import Objective, run
from gguforge.distill.trainer import evaluating

Array = NDArray[Any]


def embeddings(model: Any, batches: Iterable[Batch], pooling: Pooling) -> Array:
    """Embeddings of length 1, shape (texts, width)."""
    found = []
    with evaluating(model):
        for batch in batches:
            states = run(model, batch, states=True, scores=False).states
            assert states is not None
            found.append(pooled(states.float(), batch.attention, pooling).cpu().numpy())
    return np.concatenate(found)


def ranks(values: Array) -> Array:
    """The rank of each value from 1; equal ones share the mean of theirs.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(ours: Array, theirs: Array) -> float:
    """Spearman's rank correlation; NaN where one side is all equal or has fewer than two values.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 9.0]))
    1.0
    """
    if len(ours) < 2 or not np.ptp(ours) or not np.ptp(theirs):
        return math.nan
    return round(float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1]), 12)


def compared(ours: Array, theirs: Array) -> dict[str, float]:
    """How embeddings compare with others of the same texts, shape (texts, width) each, all of length 1.

    Returns:
        `cosine`, the mean over texts, NaN where the widths differ; `rank_correlation` of the similarities of all pairs.
    """
    pairs = np.triu_indices(len(ours), 1)
    alike = [(side @ side.T)[pairs] for side in (ours, theirs)]
    same = ours.shape[1] == theirs.shape[1]
    return {"cosine": float((ours * theirs).sum(1).mean()) if same else math.nan, "rank_correlation": spearman(*alike)}


def objective_loss(student: Any, teacher: Any, batches: Iterable[Batch], objective: Objective) -> float:
    """What a recipe's losses are on held-out text, mean over batches by their size."""
    total = count = 0.0
    with evaluating(student):
        for batch in batches:
            beside = objective.read(teacher, batch, teacher=True) if objective.wants_teacher(batch) else None
            parts = objective(batch, objective.read(student, batch), beside)
            total += float(objective.total(parts)) * batch.size
            count += batch.size
    return total / count
