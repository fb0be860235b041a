"""The minimums of groups whose steps are known: the second half of `gguforge.quant.search.recover`.

A weight is step * level - dmin * minimum. Each weight's bounds leave an interval for its group's offset; where a group
does not use the lowest level, its levels may be moved up, and the offset with them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.steps import Doubles, Levels, halves_between

Mask = NDArray[np.bool_]
Solution = tuple[NDArray[np.int64], Doubles, Levels, Levels]


class Offsets:
    """n blocks; arrays of groups have the shape (groups, n).

    Args:
        step: of each group.
        level: of each weight, 0 the lowest that its group uses, shape (size, groups, n).
        low, high: bounds of each weight, same shape.
        highest: the highest level of the type.
        most: the highest minimum; 1 for types that store the offset itself, of either sign.

    Attributes:
        open: blocks that are still wanted, shape (n,); the user of `solutions` closes them.
        tries: how many were made.
    """

    def __init__(self, step: Doubles, level: Levels, low: Doubles, high: Doubles, highest: int, most: int) -> None:
        self.step, self.most, self.tries = step, most, 0
        self.low, self.high = (step * level - high).max(axis=0), (step * level - low).min(axis=0)
        self.room = highest - level.max(axis=0)
        self.open = (self.low <= self.high).all(axis=0)

    def solutions(self, tries: int) -> Iterator[Solution]:
        """Blocks with a `dmin`, the minimum of each group, and by how much its levels are moved up.

        Args:
            tries: how many to make at most.
        """
        yield from self._fitting(np.flatnonzero(self.open), np.zeros(self.open.sum()))
        widest = np.where(self.room == 0, self.high, self.high / 1e9).argmax(axis=0)[None]
        low, high, room, step = (
            np.take_along_axis(a, widest, 0)[0] for a in (self.low, self.high, self.room, self.step)
        )
        for shift in range(int(room[self.open].max(initial=-1)) + 1):
            for minimum in range(self.most, 0, -1):
                which = np.flatnonzero(self.open & (room >= shift))
                if not len(which) or self.tries > tries:
                    break
                moved = shift * step[which]
                bounds = (low[which] + moved) / minimum, (high[which] + moved) / minimum
                for some, dmin in halves_between(*bounds):
                    yield from self._fitting(which[some], dmin)
                if self.most == 1:
                    for some, dmin in halves_between(-bounds[1], -bounds[0]):
                        yield from self._fitting(which[some], -dmin)

    def _fitting(self, which: NDArray[np.int64], dmin: Doubles) -> Iterator[Solution]:
        """Of blocks with a `dmin` those all of whose groups have a minimum."""
        here = self.open[which]
        which, dmin = which[here], dmin[here]
        if not len(which):
            return
        self.tries += 1
        low, high, step, room = (a[:, which] for a in (self.low, self.high, self.step, self.room))
        minimum, shift = np.zeros(low.shape, np.int64), np.zeros(low.shape, np.int64)
        waiting = np.ones(low.shape, np.bool_)
        for moved in range(int(room.max()) + 1):
            first, last = low + moved * step, high + moved * step
            if self.most == 1:
                value = np.ones(low.shape)
            else:
                value = np.rint(np.divide(first + last, 2 * dmin, out=np.zeros_like(low), where=dmin != 0))
                value.clip(0, self.most, out=value)
            fits = waiting & (room >= moved) & (value * dmin >= first) & (value * dmin <= last)
            minimum[fits], shift[fits] = value[fits].astype(np.int64), moved
            waiting &= ~fits
            if not waiting.any():
                break
        good = ~waiting.any(axis=0)
        if good.any():
            yield which[good], dmin[good], minimum[:, good], shift[:, good]
