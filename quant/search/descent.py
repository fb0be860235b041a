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
    extreme,
    f32,
    nearest_int,
    round_into,
    scratch,
)

Indices = NDArray[np.intp]


class Moves(NamedTuple):
    """Weights that had better have another level, one entry each: where they are, that level, both sums with it."""

    row: Indices
    column: Indices
    level: Floats
    sum_lx: Floats
    sum_l2: Floats

    def chosen(self, at: Indices) -> Moves:
        """Some of them."""
        row, column, level, sum_lx, sum_l2 = self
        return Moves(row.take(at), column.take(at), level.take(at), sum_lx.take(at), sum_l2.take(at))


class DescentFit:
    """Scale of each group by coordinate descent: x ~ scale * level, levels -nmax..nmax-1. Equals `make_q3_quants`.

    Up to five sweeps go over the weights in order; each weight moves to the level that is best with the others held
    still, if the group as a whole gains. Until one moves, the sums of a group stay what they are, so all its weights
    are asked at once, and the first after the one that moved last moves next. Few do: four groups in five never change.

    Args:
        x: weights, shape (group size, groups); the group size is a power of two.
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
        self._descend(x, lx, l2)
        self.scale: Floats = np.where((self.sum_l2 > 0) & ~self.zero, self.sum_lx / self.sum_l2, f32(0))

    def _descend(self, x: Floats, lx: Floats, l2: Floats) -> None:
        """Move weights, at most one of each group at a time; afterwards only the groups that moved can move again.

        `lx` and `l2` are the products of all groups at the start; they are used up.
        """
        size = len(x)
        groups, level = np.arange(x.shape[1]), self.level
        start, sweep = np.zeros(len(groups), np.uint8), np.zeros(len(groups), np.uint8)
        while len(groups):
            moves = self._moves(x, level, lx, l2, groups)
            ahead = (moves.row - start[moves.column]).astype(np.uint8) % np.uint8(size)
            nearest = np.full(len(groups), size, np.uint8)
            np.minimum.at(nearest, moves.column, ahead)
            sweep += start + nearest >= size
            going = np.flatnonzero((nearest < size) & (sweep < self.SWEEPS))
            first, number = np.flatnonzero(ahead == nearest[moves.column]), np.empty(len(groups), np.intp)
            number[moves.column[first]] = first
            moves, groups = (
                moves.chosen(number[going]),
                groups[going],
            )  # in order of groups: those of a cache line together
            self.level[moves.row, groups] = moves.level
            self.sum_lx[groups], self.sum_l2[groups] = moves.sum_lx, moves.sum_l2
            x, level = x.take(going, axis=1), self.level.take(groups, axis=1)  # x[:, going] would come out transposed
            lx, l2 = products(x, level)
            start, sweep = (moves.row + 1).astype(np.uint8), sweep[going]

    def _moves(self, x: Floats, level: Floats, lx: Floats, l2: Floats, groups: Indices) -> Moves:
        """All weights of some groups with which the group gains; uses the products `lx` and `l2` up."""
        sum_lx, sum_l2 = self.sum_lx[groups], self.sum_l2[groups]
        np.subtract(sum_lx, lx, out=lx)
        wanted = np.multiply(x, np.subtract(sum_l2, l2, out=l2), out=l2)
        np.rint(np.divide(wanted, lx, out=wanted), out=wanted)
        other, some = (scratch(name, (x.size // 4,)).view(np.bool_).reshape(x.shape) for name in ("other", "some"))
        np.not_equal(wanted, level, out=other)  # few; what is beyond the levels or NaN is settled below
        at = np.flatnonzero(np.logical_and(other, np.greater(lx, 0, out=some), out=other))
        row, column = np.divmod(at, x.shape[1])
        x, old, sum_lx, sum_l2 = x.take(at), level.take(at), sum_lx.take(column), sum_l2.take(column)
        w = x * x
        wx = w * x
        lx, l2 = sum_lx - wx * old, sum_l2 - w * old * old
        new = nearest_int(x * l2 / lx).astype(np.float32)
        new = np.minimum(np.maximum(new, f32(-self.nmax)), f32(self.nmax - 1))
        lx += wx * new
        l2 += w * new * new
        better = (new != old) & (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
        return Moves(row, column, new, lx, l2).chosen(np.flatnonzero(better))

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
