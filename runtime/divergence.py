"""How far one model's predictions are from another's: from scores to numbers a position, from those to statistics.

Scores are worked on a few rows at a time, so nothing of vocabulary size is kept. Formulas and their uncertainties: as
llama.cpp, tools/perplexity/perplexity.cpp (kl_divergence), which also explains them (tools/perplexity/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.runtime.forward import Logits, Tokens

BLOCK = 1 << 16  # scores worked on at a time: 256 KiB, which stays in cache
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Positions:
    """What was measured at each position, arrays of one length.

    Attributes:
        surprise: negative log-likelihood of the true token, in nats.
        base_surprise: the reference's; empty when there is none, as are the next two.
        divergence: Kullback-Leibler divergence of the model from the reference, in nats.
        same_top: whether both would say the same token.
    """

    surprise: Floats
    base_surprise: Floats
    divergence: Floats
    same_top: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """Several behind each other; at least one."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


_NONE = np.empty(0)
_NO_TOPS = np.empty(0, np.bool_)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of a few rows each, about `BLOCK` scores together."""
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


class Softmax:
    """Softmax of a block of rows, in a buffer that is reused.

    Attributes:
        top: the likeliest token of each row, the first of equal ones.
        log_total: log of the sum of the exponentials, less the largest score, shape (rows,).
        highest: the largest score, shape (rows,).
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.float32)

    def load(self, logits: Logits) -> NDArray[np.float32]:
        """Take the rows; returns exp(logits - highest), which the next call overwrites."""
        if self._buffer.size < logits.size:
            self._buffer = np.empty(logits.size, np.float32)
        exponentials = self._buffer[: logits.size].reshape(logits.shape)
        self.top = logits.argmax(axis=1)
        self.highest = np.take_along_axis(logits, self.top[:, None], axis=1)[:, 0]
        np.subtract(logits, self.highest[:, None], out=exponentials)
        np.exp(exponentials, out=exponentials)
        self.total = exponentials.sum(axis=1)  # in pairs, so float32 is enough
        self.log_total = np.log(self.total.astype(np.float64))
        return exponentials

    def surprise(self, logits: Logits, targets: Tokens) -> Floats:
        """Negative log-likelihood of one token a row."""
        there = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        found: Floats = self.highest.astype(np.float64) + self.log_total - there
        return found


def measure(logits: Logits, targets: Tokens) -> Positions:
    """One model's scores, shape (positions, vocabulary), against the true next tokens, shape (positions,)."""
    softmax, found = Softmax(), np.empty(len(logits))
    for part in blocks(*logits.shape):
        softmax.load(logits[part])
        found[part] = softmax.surprise(logits[part], targets[part])
    return Positions(found, _NONE, _NONE, _NO_TOPS)


def compare(logits: Logits, base: Logits, targets: Tokens) -> Positions:
    """Two models' scores at the same positions.

    The divergence is the mean, under the reference, of the difference of both log-probabilities. Errors of float32
    leave it within 1e-6 or so of the exact value; below zero it is cut off.
    """
    ours, theirs = Softmax(), Softmax()
    surprise, base_surprise, divergence = (np.empty(len(logits)) for _ in range(3))
    same = np.empty(len(logits), np.bool_)
    for part in blocks(*logits.shape):
        q, p, wanted = logits[part], base[part], targets[part]
        difference = ours.load(q)
        surprise[part] = ours.surprise(q, wanted)
        weights = theirs.load(p)
        base_surprise[part] = theirs.surprise(p, wanted)
        np.subtract(p, q, out=difference)
        difference -= (theirs.highest - ours.highest)[:, None]
        mean = np.einsum("ij,ij->i", weights, difference) / theirs.total
        divergence[part] = np.maximum(mean + (ours.log_total - theirs.log_total), 0)
        same[part] = ours.top == theirs.top
    return Positions(surprise, base_surprise, divergence, same)


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference, over all positions.

    Attributes:
        base_perplexity: the reference's.
        log_ratio: ln(perplexity / the reference's).
        correlation: of both models' surprises.
        mean: mean divergence, nats.
        quantiles: divergence that so many of the positions stay under; 0.5 is the median, 1.0 the maximum.
        same_top: share of positions with the same likeliest token.
        rms_change: root mean square of the change of the true token's probability.
        mean_change: its mean.
    """

    base_perplexity: Estimate
    log_ratio: Estimate
    correlation: float
    mean: Estimate
    quantiles: dict[float, Estimate]
    same_top: Estimate
    rms_change: Estimate
    mean_change: Estimate


def mean(values: NDArray[Any]) -> Estimate:
    """Mean and its standard error, positions taken as independent; 0 for ten and fewer, as llama-perplexity."""
    return Estimate(float(np.mean(values)), _error(values))


def _error(values: NDArray[Any]) -> float:
    return float(np.std(values)) / math.sqrt(len(values) - 1) if len(values) > 10 else 0.0


def perplexity(surprise: Floats) -> Estimate:
    """exp of the mean surprise; the error is carried through exp."""
    found = mean(surprise)
    value = math.exp(found.value)
    return Estimate(value, value * found.error)


def quantile(ordered: Floats, share: float) -> Estimate:
    """A quantile of sorted values, between its neighbours in proportion.

    The error is half the distance between the values whose ranks are one standard deviation (of the binomial
    distribution), at least one rank, below and above: it supposes nothing about how the values are distributed.
    """
    count = len(ordered)
    spread = max(1.0, math.sqrt(count * share * (1 - share)))
    place = share * (count - 1)
    low, high = ordered[max(0, math.floor(place - spread))], ordered[min(count - 1, math.ceil(place + spread))]
    return Estimate(float(np.quantile(ordered, share)), float(high - low) / 2)


def summarize(positions: Positions) -> Comparison:
    """The statistics of a comparison."""
    ours, base = positions.surprise, positions.base_surprise
    change = np.exp(-ours) - np.exp(-base)
    squared = mean(change**2)
    rms = math.sqrt(squared.value)
    share = float(np.mean(positions.same_top))
    ordered = np.sort(positions.divergence)
    spread = float(np.std(ours) * np.std(base))
    covariance = float(np.mean(ours * base) - np.mean(ours) * np.mean(base))
    return Comparison(
        base_perplexity=perplexity(base),
        log_ratio=mean(ours - base),
        correlation=covariance / spread if spread else 1.0,
        mean=mean(positions.divergence),
        quantiles={share: quantile(ordered, share) for share in QUANTILES},
        same_top=Estimate(share, math.sqrt(share * (1 - share) / max(1, len(ours) - 1))),
        rms_change=Estimate(rms, 0.5 / rms * squared.error if rms else 0.0),
        mean_change=mean(change),
    )
