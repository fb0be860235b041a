"""Evenly spaced weights: the step that a group of weights are whole multiples of, found from the weights alone.

Weights that were decoded from blocks and then rounded (to BF16, say) are no exact multiples any more, but each still
tells an interval that the decoded number lay in. A step fits a group if one level for each weight puts all of them into
their intervals. Of all steps that fit, the coarsest is kept: the others are its fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGMLQuantizationType as T

Doubles = NDArray[np.float64]
Levels = NDArray[np.int64]

FIRST = 6  # weights of a group by which steps are tried first
AT_ONCE = 8  # steps tried by them at once
TILE = 1024  # groups at once
ROUNDS = 4  # of narrowing a step
NEIGHBOURS = 128  # half-precision numbers of an interval that are tried; 8 where one weight's rounding is all it is
NEARLY = 1e-9  # of a level, and
SLACK = 1e-14  # of a bound: divisions round; what is found is proved by decoding


def interval(x: NDArray[np.float32], stored: T) -> tuple[Doubles, Doubles]:
    """The numbers that become `x` when they are rounded to its stored type: lowest and highest, the shape of `x`.

    >>> [bound.tolist() for bound in interval(np.array([1.0], np.float32), T.BF16)]
    [[0.998046875], [1.00390625]]
    """
    if stored == T.F16:
        bits = np.abs(x).astype(np.float16).view(np.uint16).astype(np.int64)
        values = [(bits + n).clip(0).astype(np.uint16).view(np.float16).astype(np.float64) for n in (-1, 0, 1)]
    else:
        bits, one = np.abs(x).view(np.uint32).astype(np.int64), 1 << 16 if stored == T.BF16 else 1
        values = [(bits + n * one).clip(0).astype(np.uint32).view(np.float32).astype(np.float64) for n in (-1, 0, 1)]
    below, here, above = values
    high = (here + above) / 2
    low = np.where(bits == 0, -high, (below + here) / 2)
    return np.where(x < 0, -high, low), np.where(x < 0, -low, high)


@dataclass
class Steps:
    """The coarsest steps of m groups.

    Attributes:
        low, high: bounds of the step, shape (m,); 0 and infinity where all weights are alike and need none.
        level: of each weight in such steps, shape (size, m); of groups with minimums, above the lowest weight.
        top: the largest magnitude of a level, shape (m,).
        found: where there is such a step, shape (m,).
    """

    low: Doubles
    high: Doubles
    level: Levels
    top: Levels
    found: NDArray[np.bool_]


def steps_of(x: Doubles, low: Doubles, high: Doubles, tops: tuple[int, ...], minimums: bool) -> Steps:
    """Find each group's step.

    Args:
        x: weights, shape (size, m).
        low, high: their bounds, same shape.
        tops: numbers to try as the largest level, in this order.
        minimums: whether levels count from the group's lowest weight, and not from 0.
    """
    count = x.shape[1]
    found = Steps(np.zeros(count), np.full(count, np.inf), np.zeros(x.shape, np.int64), np.zeros(count, np.int64),
                  np.zeros(count, np.bool_))  # fmt: skip
    for start in range(0, count, TILE):
        part = slice(start, start + TILE)
        _tile(_Group(x[:, part], low[:, part], high[:, part], minimums), part, tops, found)
    return found


def _tile(group: _Group, part: slice, tops: tuple[int, ...], found: Steps) -> None:
    found.found[part] = group.peak_high <= 0
    for first in range(0, len(tops), AT_ONCE):
        waiting = np.flatnonzero(~found.found[part])
        if not len(waiting):
            return
        some = tops[first : first + AT_ONCE]
        promising = group.take(waiting, FIRST).may_fit(np.array(some)[:, None])  # (tops, groups)
        for top, hopes in zip(some, promising, strict=True):
            which = waiting[hopes & ~found.found[waiting + part.start]]
            if not len(which):
                continue
            tried = group.take(which)
            low, high, good, level = tried.fit(top)
            put = which[good] + part.start
            found.low[put], found.high[put], found.top[put] = low[good], high[good], top
            found.level[:, put], found.found[put] = (level * tried.sign)[:, good], True


class _Group:
    """m groups of weights as distances, with a sign, from where their levels begin: from 0, or the lowest weight.

    A positive weight that all of a group are equal to counts from 0: a step is needed to reach it.

    Attributes:
        low, high: bounds of the distances, shape (size, m).
        peak_low, peak_high: of the largest one, shape (m,); 0 where all are 0.
        back_low, back_high: of the distances to the largest one, where levels begin at the lowest weight.
    """

    def __init__(self, x: Doubles, low: Doubles, high: Doubles, minimums: bool) -> None:
        self.minimums, self.sign = minimums, np.where(x < 0, -1, 1)
        base_low = base_high = np.zeros(x.shape[1])
        if minimums:
            self.sign = np.ones(x.shape, np.int64)
            lowest = x.argmin(axis=0)[None]
            base, base_low, base_high = (np.take_along_axis(a, lowest, 0)[0] for a in (x, low, high))
            same = (x[0] == x).all(axis=0) & (x[0] > 0)
            base, base_low, base_high = (np.where(same, 0, a) for a in (base, base_low, base_high))
            distance, self.low, self.high = x - base, low - base_high, high - base_low
        else:
            distance = np.abs(x)
            self.low, self.high = np.where(x < 0, -high, low), np.where(x < 0, -low, high)
        peak = distance.argmax(axis=0)[None]
        flat = np.take_along_axis(distance, peak, 0)[0] == 0
        self.peak_low, self.peak_high = (
            np.where(flat, 0, np.take_along_axis(a, peak, 0)[0]) for a in (self.low, self.high)
        )
        self.back_low = np.take_along_axis(low, peak, 0)[0] - high
        self.back_high = np.take_along_axis(high, peak, 0)[0] - low

    def take(self, columns: NDArray[np.int64], weights: int | None = None) -> _Group:
        """Some of the groups, and of each the first weights."""
        made = object.__new__(_Group)
        made.minimums = self.minimums
        for name in ("low", "high", "sign", "back_low", "back_high"):
            setattr(made, name, getattr(self, name)[:weights, columns])
        made.peak_low, made.peak_high = self.peak_low[columns], self.peak_high[columns]
        return made

    def may_fit(self, top: Levels) -> NDArray[np.bool_]:
        """Whether each weight for itself may be a whole number of steps if the largest is `top` of them."""
        first, last = self._levels(self.peak_low / top, self.peak_high / top)
        return np.asarray((first <= last).all(axis=-2))

    def fit(self, top: int) -> tuple[Doubles, Doubles, NDArray[np.bool_], Levels]:
        """Bounds of the step if the largest is `top` of them, whether there is one, and the levels.

        Where rounding leaves a choice of levels, those that are certain narrow the step until most others are.
        """
        low, high = self.peak_low / top, self.peak_high / top
        for _ in range(ROUNDS):
            first, last = self._levels(low, high)
            certain = first == last
            low, high = self._bounds(np.where(certain, first, 0), top, low, high)
            if certain.all():
                break
        level = np.where(certain, first, np.rint((self.low + self.high) / (low + high)))
        at_zero = (level > 0) | ((self.low <= 0) & (self.high >= 0))
        return low, high, (low <= high) & (first <= last).all(axis=0) & at_zero.all(axis=0), level.astype(np.int64)

    def _levels(self, low: Doubles, high: Doubles) -> tuple[Doubles, Doubles]:
        """The lowest and the highest level that each weight may have, for bounds of the step."""
        high, low = high[..., None, :], low[..., None, :]
        return np.ceil(self.low / high - NEARLY), np.floor(self.high / low + NEARLY)

    def _bounds(self, level: Doubles, top: int, low: Doubles, high: Doubles) -> tuple[Doubles, Doubles]:
        """Bounds of the step, narrowed by levels; level 0 tells nothing."""
        steps = np.where(level == 0, np.nan, level)
        low, high = np.fmax(low, np.fmax.reduce(self.low / steps)), np.fmin(high, np.fmin.reduce(self.high / steps))
        if self.minimums:
            rest = np.where((level == 0) | (level >= top), np.nan, top - level)
            low = np.fmax(low, np.fmax.reduce(self.back_low / rest))
            high = np.fmin(high, np.fmin.reduce(self.back_high / rest))
        return low * (1 - SLACK), high * (1 + SLACK)


def halves_between(low: Doubles, high: Doubles) -> Iterator[tuple[NDArray[np.int64], Doubles]]:
    """The half-precision numbers of intervals above 0, the lowest of each, then the next...

    Yields:
        Which intervals have one, and it.
    """
    first = np.maximum(low, 0).astype(np.float16).view(np.uint16).astype(np.int64)
    first += first.astype(np.uint16).view(np.float16) < low
    for more in range(NEIGHBOURS):
        value = np.minimum(first + more, 0x7C00).astype(np.uint16).view(np.float16).astype(np.float64)
        inside = np.flatnonzero((value <= high) & (value < np.inf) & (value > 0))
        if not len(inside):
            return
        yield inside, value[inside]
