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


class Moves(NamedTuple):
    """Weights that get another level, one of each of some groups: where, that level, both sums with it."""

    row: Indices
    group: Indices
    level: Floats
    sum_lx: Floats
    sum_l2: Floats


class DescentFit:
    """Scale of each group by coordinate descent: x ~ scale * level, levels -nmax..nmax-1. Equals `make_q3_quants`.

    Up to five sweeps go over the weights in order; each weight moves to the level that is best with the others held
    still, if the group as a whole gains. Until one moves, the sums of a group stay what they are, so all its weights
    are asked at once, and the first after the one that moved last moves next. Few do: four groups in five never change.

    Args:
        x: weights, shape (group size, groups); the group size is 16 or a smaller power of two.
        nmax: half the number of levels.

    Attributes:
        scale: shape (groups,).
    """

    SWEEPS = 5

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
        self._descend(x, self._first_moves(x, lx, l2))
        self.scale: Floats = np.where((self.sum_l2 > 0) & ~self.zero, self.sum_lx / self.sum_l2, f32(0))

    def _first_moves(self, x: Floats, lx: Floats, l2: Floats) -> Moves:
        """The first weight of each group with which the group gains; uses up the products `lx` and `l2`.

        What can be told of all weights leaves few to look at closely.
        """
        np.subtract(self.sum_lx, lx, out=lx)
        wanted = np.multiply(x, np.subtract(self.sum_l2, l2, out=l2), out=l2)
        np.rint(np.divide(wanted, lx, out=wanted), out=wanted)
        other = byte_scratch("other", x.shape).view(np.bool_)
        np.not_equal(wanted, self.level, out=other)  # also what is beyond the levels, or NaN
        at = np.flatnonzero(other)
        row, group = np.divmod(at, x.shape[1])
        sums = self.sum_lx.take(group), self.sum_l2.take(group)
        level, sum_lx, sum_l2, better = self._asked(x.take(at), self.level.take(at), *sums)
        gains = np.flatnonzero(better)
        first = np.full(x.shape[1], len(at))
        np.minimum.at(first, group[gains], gains)
        groups = np.flatnonzero(first < len(at))
        first = first[groups]
        return Moves(row[first], groups, level[first], sum_lx[first], sum_l2[first])

    def _asked(self, x: Floats, level: Floats, sum_lx: Floats, sum_l2: Floats) -> tuple[Floats, Floats, Floats, Mask]:
        """The level that each weight wants, both sums of its group with that level, and whether the group gains."""
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
        return wanted, lx, l2, better

    def _descend(self, x: Floats, moves: Moves) -> None:
        """Make moves, one of each group at a time; only the groups that moved can move again."""
        size = len(x)
        row = np.arange(size, dtype=np.uint8)[:, None]
        groups = moves.group
        both = np.concatenate([x.take(groups, axis=1), self.level.take(groups, axis=1)])
        sweep = np.zeros(len(groups), np.uint8)
        while len(groups):
            self._make(moves)
            columns = np.arange(len(groups))
            x, level = both[:size], both[size:]
            level[moves.row, columns] = moves.level
            wanted, lx, l2, better = self._asked(x, level, moves.sum_lx, moves.sum_l2)
            start = (moves.row + 1).astype(np.uint8)
            ahead = row - start
            ahead &= np.uint8(size - 1)
            ahead |= np.logical_not(better, out=better).view(np.uint8) * np.uint8(size)
            end = ahead.min(axis=0)
            going = end < size
            end += start
            sweep += end >= size
            going &= sweep < self.SWEEPS
            left = np.flatnonzero(going)
            groups, sweep, both = groups.take(left), sweep.take(left), both.take(left, axis=1)
            to = (end.take(left) & np.uint8(size - 1)).astype(np.intp)
            at = to * len(columns) + left
            moves = Moves(to, groups, wanted.take(at), lx.take(at), l2.take(at))

    def _make(self, moves: Moves) -> None:
        """Keep the levels and the sums that moves lead to."""
        self.level[moves.row, moves.group] = moves.level
        self.sum_lx[moves.group], self.sum_l2[moves.group] = moves.sum_lx, moves.sum_l2

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
