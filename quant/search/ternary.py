"""Scale, shift and grid points of each group: the search of the IQ1 types.

A weight is scale * (t + shift), t = -1, 0 or 1, shift = +1/8 or -1/8. Sorted, the weights of a group fall into three
runs: all ways to split them are tried, and the best is moved to the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, f32, scratch
from gguforge.quant.search.grids import grid
from gguforge.quant.search.lattice import FLT_MAX, Indices, as_points, nearest_points

DELTA = f32(0.125)
UP = np.array([-1, 0, 1], np.float32) + DELTA  # what the three levels stand for with a positive shift
DOWN = np.array([-1, 0, 1], np.float32) - DELTA
LEAST, MOST = f32(1e-30), f32(1e37)  # between them products keep all their bits
CLOSE = f32(1 - 1e-4)  # scores that rounding could bring above the best are at least this part of it

Ints = NDArray[np.intp]


class Split(NamedTuple):
    """The best split of each group, shape (groups,): the two boundaries in sorted order, the combination of shifts."""

    first: Ints
    second: Ints
    combination: Ints
    scale: Floats
    found: Mask


class Candidates(NamedTuple):
    """Sums of w * q * x and w * q^2 for one first boundary: all second ones, all combinations of shifts.

    Shape (second boundaries, combinations, groups).
    """

    sum_qx: Floats
    sum_q2: Floats


def sorted_sums(x: Floats, w: Floats, halves: int) -> tuple[Ints, Floats, Floats]:
    """The order of the weights of each group, and running sums of w * x and w in that order.

    Shapes (size, groups), and twice (halves, size + 1, groups): with two halves each has sums of its own.
    """
    size, n = x.shape
    order = x.argsort(axis=0, kind="stable")
    wx = np.take_along_axis(w * x, order, axis=0)
    ws = np.take_along_axis(w, order, axis=0)
    sum_x, sum_w = np.zeros((halves, size + 1, n), np.float32), np.zeros((halves, size + 1, n), np.float32)
    for half in range(halves):
        mine = order * halves // size == half
        for j in range(size):
            sum_x[half, j + 1] = np.where(mine[j], sum_x[half, j] + wx[j], sum_x[half, j])
            sum_w[half, j + 1] = np.where(mine[j], sum_w[half, j] + ws[j], sum_w[half, j])
    return order, sum_x, sum_w


def splits_of_one(sum_x: Floats, sum_w: Floats) -> Iterator[Candidates]:
    """Candidates of IQ1_S: one shift for the group, up or down."""
    sx, sw = sum_x[0], sum_w[0]
    size = len(sx) - 1
    for i in range(size + 1):
        qx, q2 = (np.empty((size + 1 - i, 2, sx.shape[1]), np.float32) for _ in range(2))
        for k, v in enumerate((UP, DOWN)):
            middle, last = sx[i:] - sx[i], sx[size] - sx[i:]
            qx[:, k] = sx[i] * v[0] + middle * v[1] + last * v[2]
            middle, last = sw[i:] - sw[i], sw[size] - sw[i:]
            q2[:, k] = sw[i] * v[0] * v[0] + middle * v[1] * v[1] + last * v[2] * v[2]
        yield Candidates(qx, q2)


def splits_of_two(sum_x: Floats, sum_w: Floats) -> Iterator[Candidates]:
    """Candidates of IQ1_M: each half of the group has a shift of its own."""
    size = sum_x.shape[1] - 1
    for i in range(size + 1):
        sx = sum_x[:, i, None] + sum_x[:, i:]  # (halves, second boundaries, groups)
        qx = [sum_x[:, size, None] * v[2] - sx for v in (UP, DOWN)]
        q2 = [
            sum_w[:, size, None] * v[2] * v[2]
            + sum_w[:, i, None] * (v[0] * v[0] - v[1] * v[1])
            + sum_w[:, i:] * (v[1] * v[1] - v[2] * v[2])
            for v in (UP, DOWN)
        ]
        pairs = [(a, b) for a in range(2) for b in range(2)]
        yield Candidates(
            np.stack([qx[a][0] + qx[b][1] for a, b in pairs], axis=1),
            np.stack([q2[a][0] + q2[b][1] for a, b in pairs], axis=1),
        )


def best_split(candidates: Iterator[Candidates], size: int, shifts: int, n: int) -> Split:
    """The candidate that C's loop ends with: each replaces the best so far if it explains more of the group.

    Its comparison is rounded, so that of candidates which are nearly equal the order decides. Only those near the top
    can matter: they are compared again in C's order.
    """
    every = [(i, j, k) for i in range(size + 1) for j in range(i, size + 1) for k in range(shifts)]
    first, second, combination = np.array(every).T
    qx, q2, score = (scratch(name, (len(every), n)) for name in ("qx", "q2", "score"))
    at = 0
    for found in candidates:
        part = slice(at, at + found.sum_qx.size // n)
        qx[part], q2[part] = found.sum_qx.reshape(-1, n), found.sum_q2.reshape(-1, n)
        at = part.stop
    np.divide(qx, q2, out=score)
    score *= qx
    top = score.max(axis=0, initial=0, where=q2 > 0)
    normal = (top * q2.min(axis=0) > LEAST) & (
        top * q2.max(axis=0) < MOST
    )  # else rounding is too coarse to leave any out
    least = np.where(normal, top * CLOSE, np.where(q2.max(axis=0) > 0, -np.inf, np.inf))
    number, group = np.divmod(np.flatnonzero(score >= least), n)
    order = group.argsort(kind="stable")
    number, group = number[order], group[order]
    scale, best = np.zeros(n, np.float32), np.full(n, -FLT_MAX, np.float32)
    chosen = np.full(n, -1, np.intp)
    rank = np.arange(len(group)) - np.searchsorted(group, group)  # place of each among those of its group
    for r in range(int(rank.max(initial=-1)) + 1):
        here = rank == r
        g, c = group[here], number[here]
        won = (q2[c, g] > 0) & (qx[c, g] * qx[c, g] > best[g] * q2[c, g])
        g, c = g[won], c[won]
        scale[g], chosen[g] = qx[c, g] / q2[c, g], c
        best[g] = scale[g] * qx[c, g]
    return Split(first[chosen], second[chosen], combination[chosen], scale, chosen >= 0)


class TernaryFit:
    """Scale, shifts and grid points of each group. Equals the searches of `quantize_row_iq1_s_impl` and `..._m_impl`.

    Args:
        x: weights, shape (group size, groups).
        w: importance of each weight, same shape.
        halves: 1 (one shift for a group, IQ1_S) or 2 (one for each half, IQ1_M).

    Attributes:
        scale: shape (groups,), not negative; no number where C would give up.
        index: grid points, shape (group size / 8, groups).
        down: whether the shift of each point is negative, same shape.
        found: whether there is a split: not where no weight has importance. Nothing else means anything there.
    """

    def __init__(self, x: Floats, w: Floats, halves: int) -> None:
        size, n = x.shape
        order, sum_x, sum_w = sorted_sums(x, w, halves)
        splits = splits_of_one if halves == 1 else splits_of_two
        split = best_split(splits(sum_x, sum_w), size, 2 * halves, n)
        self.found = split.found
        place = np.arange(size)[:, None]
        level = np.empty((size, n), np.uint8)
        in_order = (place >= split.first).astype(np.uint8) + (place >= split.second)
        np.put_along_axis(level, order, in_order, axis=0)
        down = np.stack([split.combination >> (halves - 1 - half) & 1 for half in range(halves)]) > 0
        negative = split.scale < 0
        level[:, negative] = 2 - level[:, negative]
        self.scale: Floats = np.abs(split.scale)
        self.down: Mask = (down ^ negative).repeat(size // 8 // halves, axis=0)
        self._to_grid(x, w, level)

    def _to_grid(self, x: Floats, w: Floats, level: NDArray[np.uint8]) -> None:
        """Move points that are not on the grid to the nearest that are, and fit the scale of their groups again."""
        points, n = grid("IQ1_S"), x.shape[1]
        digits = level.reshape(-1, 8, n)
        codes = (digits.astype(np.intp) * points.place[:, None]).sum(axis=1)
        self.index: Indices = points.index[codes]
        row, group = np.nonzero((self.index < 0) & self.found)
        if not len(row):
            return
        shift = np.where(self.down[row, group], -DELTA, DELTA)
        near = nearest_points(
            points, as_points(x, 8), as_points(w, 8), row * n + group, self.scale[group], codes[row, group], shift
        ).best
        self.index[row, group] = np.maximum(near, 0)
        again = np.unique(group)
        q = self.values(again)
        wq = w.take(again, axis=1) * q
        sum_qx, sum_q2 = add_up(wq * x.take(again, axis=1)), add_up(wq * q)
        better = (sum_qx > 0) & (sum_q2 > 0)
        self.scale[again[better]] = (sum_qx / sum_q2)[better]
        self.scale[group[near < 0]] = np.nan

    def values(self, groups: Ints) -> Floats:
        """What the kept rounding of some groups stands for, divided by the scale: shape (group size, len(groups))."""
        points = grid("IQ1_S").points[self.index[:, groups]]  # (points, groups, 8)
        shift = np.where(self.down[:, groups], -DELTA, DELTA)[..., None]
        values: Floats = np.ascontiguousarray((points + shift).swapaxes(1, 2)).reshape(-1, len(groups))
        return values
