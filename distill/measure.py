"""What a student is worth on text it never saw: cross-entropy, divergence from its teacher, calibration.

Every scored token of the held-out documents counts, and the teacher's rows are whole: the divergence is never
estimated from draws, whose entropy is unknown. Names and formulas are those of `gguforge evaluate`. What only encoders
are measured by is in `gguforge.distill.encoders.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.batches import Batch, make_batch
from gguforge.distill.objective import run
from gguforge.distill.shards import Document
from gguforge.distill.trainer import evaluating
from gguforge.runtime.divergence import Positions, compare, measure

BATCH = 4  # documents read at once
BINS = 15  # of confidence, for the calibration error


@dataclass(frozen=True)
class Measured:
    """A student on held-out text; NaN for what was not measured.

    Attributes:
        positions: tokens that were scored; for an encoder without a head, texts.
        cross_entropy: of the true token, nats.
        divergence: mean KL(teacher || student), nats; NaN without a teacher, as the next two.
        same_top: share of tokens for which both would say the same.
        teacher_cross_entropy: the teacher's own.
        calibration_error: expected difference of confidence and hits, 15 bins (Guo et al. 2017, arXiv:1706.04599).
        accuracy, teacher_accuracy: share of tokens for which the true one is the most probable.
        cosine: of an encoder: mean cosine of its texts' embeddings and the teacher's, where the widths are equal.
        rank_correlation: Spearman's, of the similarities of all pairs of texts and the teacher's.
        loss: the recipe's own, where an encoder has no head.
    """

    positions: int
    cross_entropy: float
    divergence: float
    same_top: float
    teacher_cross_entropy: float
    calibration_error: float
    accuracy: float = math.nan
    teacher_accuracy: float = math.nan
    cosine: float = math.nan
    rank_correlation: float = math.nan
    loss: float = math.nan


def scores(model: Any, batch: Batch) -> NDArray[np.float32]:
    """A model's scores at a batch's places, shape (places, vocabulary)."""
    with evaluating(model):
        out = run(model, batch).scores
    assert out is not None
    found: NDArray[np.float32] = out.float().cpu().numpy()
    return found


def measured(student: Any, teacher: Any, documents: Sequence[Document], device: Any) -> Measured:
    """Measure a student that predicts the next token, beside its teacher if there is one."""
    starts = range(0, len(documents), BATCH)
    return measured_on(student, teacher, (make_batch(documents[start : start + BATCH], device) for start in starts))


def measured_on(student: Any, teacher: Any, batches: Iterable[Batch]) -> Measured:
    """Measure a student at the places of some batches, beside its teacher if there is one."""
    parts: list[Positions] = []
    confidence, hits, teacher_hits = [], [], [np.zeros(0, np.bool_)]
    for batch in batches:
        wanted = batch.tokens.cpu().numpy()
        ours = scores(student, batch)
        if teacher is None:
            parts.append(measure(ours, wanted))
        else:
            base = scores(teacher, batch)
            shared = min(ours.shape[1], base.shape[1])
            parts.append(compare(ours[:, :shared], base[:, :shared], wanted))
            teacher_hits.append(base.argmax(axis=1) == wanted)
        top = ours.max(axis=1, keepdims=True)
        confidence.append(1 / np.exp(ours - top).sum(axis=1))
        hits.append(ours.argmax(axis=1) == wanted)
    found = Positions.joined(parts)
    return Measured(
        positions=len(found.surprise),
        cross_entropy=float(found.surprise.mean()),
        divergence=_mean(found.divergence),
        same_top=_mean(found.same_top),
        teacher_cross_entropy=_mean(found.base_surprise),
        calibration_error=calibration_error(np.concatenate(confidence), np.concatenate(hits)),
        accuracy=_mean(np.concatenate(hits)),
        teacher_accuracy=_mean(np.concatenate(teacher_hits)),
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def calibration_error(confidence: NDArray[Any], hits: NDArray[np.bool_]) -> float:
    """Mean over tokens of |confidence - share of hits| within bins of like confidence.

    >>> calibration_error(np.array([0.9] * 10), np.array([True] * 9 + [False]))
    0.0
    >>> round(calibration_error(np.array([0.9] * 10), np.array([True] * 5 + [False] * 5)), 3)
    0.4
    """
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count, sure, hit = (np.bincount(place, weights, BINS) for weights in (None, confidence, hits.astype(float)))
    error = float(np.abs(sure - hit).sum() / max(1, count.sum()))
    return round(error, 12)
