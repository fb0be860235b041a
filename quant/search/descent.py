"""Scale of each group, levels on both sides of zero, by coordinate descent."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import (
    GROUP_MAX_EPS,
    Floats,
    Mask,
    add_up,
    byte_scratch,
    extreme,
    f32,
    round_into,
    scratch,
)

Indices = NDArray[np.intp]


class Asked(NamedTuple):
    """What weights of groups want: a level, both sums of their group with it, and whether the group gains by it."""

    level: Floats
    sum_lx: Floats
    sum_l2: Floats
    better: Mask


class Descent:
    """Coordinate descent on the levels of groups, x ~ scale * level.

    Up to five sweeps go over the weights in order; each weight moves to the level that is best with the others held
    still, if the group as a whole gains. Until one moves, the sums of a group stay what they are, so all its weights
    are asked at once, and the first after the one that moved last moves next.

    Attributes:
        level: shape (group size, groups); the group size is a power of two, at most 64.
        sum_lx, sum_l2: sums of w * level * x and of w * level^2, shape (groups,).
    """

    SWEEPS = 5
    level: Floats
    sum_lx: Floats
    sum_l2: Floats

    def _asked(self, state: Floats, sum_lx: Floats, sum_l2: Floats) -> Asked:
        """Ask all weights; the last rows of `state` are levels, those above what else is known of the weights."""
        raise NotImplementedError

    def _descend(self, groups: Indices, state: Floats, start: NDArray[np.uint8]) -> None:
        """Move weights, one of each group at a time; only the groups that moved can move again.

        Args:
            groups: those to look at.
            state: what `_asked` wants to know of them, shape (several times the group size, len(groups)).
            start: the weight that is asked first, shape (len(groups),).
        """
        size = len(self.level)
        row, end_of_group = np.arange(size, dtype=np.uint8)[:, None], np.uint8(size - 1)
        sweep = np.zeros(len(groups), np.uint8)
        sum_lx, sum_l2 = self.sum_lx.take(groups), self.sum_l2.take(groups)
        while len(groups):
            asked = self._asked(state, sum_lx, sum_l2)
            ahead = row - start
            ahead &= end_of_group
            ahead |= np.logical_not(asked.better, out=asked.better).view(np.uint8) * np.uint8(size)
            end = ahead.min(axis=0)
            going = end < size
            end += start
            sweep += end >= size
            going &= sweep < self.SWEEPS
            left = np.flatnonzero(going)
            to = (end.take(left) & end_of_group).astype(np.intp)
            at = to * len(groups) + left
            groups, sweep, state = groups.take(left), sweep.take(left), state.take(left, axis=1)
            level, sum_lx, sum_l2 = (array.take(at) for array in asked[:3])
            state[-size:][to, np.arange(len(left))] = level
            self._move(to, groups, level, sum_lx, sum_l2)
            start = (to + 1).astype(np.uint8)

    def _move(self, row: Indices, groups: Indices, level: Floats, sum_lx: Floats, sum_l2: Floats) -> None:
        """Give one weight of each of some groups another level."""
        self.level[row, groups] = level
        self.sum_lx[groups], self.sum_l2[groups] = sum_lx, sum_l2


class DescentFit(Descent):
    """Scale of each group by coordinate descent: x ~ scale * level, levels -nmax..nmax-1. Equals `make_q3_quants`.

    Few weights move: four groups in five never change.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.

    Attributes:
        scale: shape (groups,).
    """

    def __init__(self, x: Floats, nmax: int) -> None:
        self.nmax = nmax
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        inverse = f32(-nmax) / peak
        self.level = np.multiply(x, inverse, out=scratch("level", x.shape))
        round_into(self.level, -nmax, nmax - 1, bool(np.isfinite(inverse).all()))
        lx, l2 = products(x, self.level)
        self.sum_lx, self.sum_l2 = add_up(lx), add_up(l2)
        row, groups = self._first_moves(x, lx, l2)
        state = np.concatenate([x.take(groups, axis=1), self.level.take(groups, axis=1)])
        self._descend(groups, state, (row + 1).astype(np.uint8))
        self.scale: Floats = np.where((self.sum_l2 > 0) & ~self.zero, self.sum_lx / self.sum_l2, f32(0))

    def _first_moves(self, x: Floats, lx: Floats, l2: Floats) -> tuple[Indices, Indices]:
        """Move the first weight of each group with which the group gains; uses up the products `lx` and `l2`.

        What can be told of all weights at once leaves few to look at closely. Returns which moved, and their groups.
        """
        np.subtract(self.sum_lx, lx, out=lx)
        wanted = np.multiply(x, np.subtract(self.sum_l2, l2, out=l2), out=l2)
        np.rint(np.divide(wanted, lx, out=wanted), out=wanted)
        other = byte_scratch("other", x.shape).view(np.bool_)
        np.not_equal(wanted, self.level, out=other)  # also what is beyond the levels, or NaN
        at = np.flatnonzero(other)
        row, group = np.divmod(at, x.shape[1])
        state = np.stack([x.take(at), self.level.take(at)])
        asked = self._asked(state, self.sum_lx.take(group), self.sum_l2.take(group))
        gains = np.flatnonzero(asked.better)
        first = np.full(x.shape[1], len(at))
        np.minimum.at(first, group[gains], gains)
        groups = np.flatnonzero(first < len(at))
        first = first[groups]
        row = row[first]
        self._move(row, groups, *(array.reshape(-1).take(first) for array in asked[:3]))
        return row, groups

    def _asked(self, state: Floats, sum_lx: Floats, sum_l2: Floats) -> Asked:
        x, level = state.reshape(2, len(state) // 2, state.shape[1])
        w, wx, lx, l2, wanted = (scratch(name, x.shape) for name in ("w", "wx", "lx", "l2", "wanted"))
        np.multiply(np.square(x, out=w), x, out=wx)
        np.subtract(sum_lx, np.multiply(wx, level, out=lx), out=lx)
        np.multiply(np.multiply(w, level, out=l2), level, out=l2)
        np.multiply(x, np.subtract(sum_l2, l2, out=l2), out=wanted)
        round_into(np.divide(wanted, lx, out=wanted), -self.nmax, self.nmax - 1, False)
        better = lx > 0
        better &= wanted != level
        lx += np.multiply(wx, wanted, out=wx)
        l2 += np.multiply(np.multiply(w, wanted, out=w), wanted, out=w)
        better &= l2 > 0
        np.multiply(np.square(lx, out=w), sum_l2, out=w)
        better &= w > np.multiply(sum_lx * sum_lx, l2, out=wx)
        return Asked(wanted, lx, l2, better)

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The kept levels plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level: Floats = self.level[:, groups] + f32(self.nmax)
        level[:, self.zero[groups]] = 0
        return level


def products(x: Floats, level: Floats) -> tuple[Floats, Floats]:
    """w * x * level and w * level^2 with w = x^2, in working memory; shapes as they come."""
    w = np.square(x, out=scratch("w", x.shape))
    l2 = np.multiply(w, level, out=scratch("l2", x.shape))
    np.multiply(l2, level, out=l2)
    lx = np.multiply(w, x, out=w)
    return np.multiply(lx, level, out=lx), l2
