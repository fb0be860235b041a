"""The best rounding of each group to three levels, grid or no grid: the first part of the search of the IQ1 types.

A weight is scale * (t + shift), t = -1, 0 or 1, shift = +1/8 or -1/8. Sorted, the weights of a group fall into three
runs: all ways to split them are tried. Equals the loops of `quantize_row_iq1_s_impl` and `..._m_impl`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, f32, scratch, winners

Bytes = NDArray[np.uint8]
Ints = NDArray[np.intp]

DELTA = f32(0.125)
UP = np.array([-1, 0, 1], np.float32) + DELTA  # what the three levels stand for with a positive shift
DOWN = np.array([-1, 0, 1], np.float32) - DELTA
FLT_MAX = np.finfo(np.float32).max
LEAST, MOST = f32(1e-30), f32(1e37)  # between them products keep all their bits
CLOSE = f32(1 - 3e-4)  # scores that rounding could bring above the best are at least this part of it
TILE = 1 << 15  # weights whose splits are tried at once


class Sums(NamedTuple):
    """Weights of groups in order, shape (halves, size + 1, groups): with two halves each has sums of its own.

    Attributes:
        x: running sums of w * x.
        w: running sums of w.
    """

    x: Floats
    w: Floats


class Rounded(NamedTuple):
    """The best rounding of groups.

    Attributes:
        level: 0..2, shape (group size, groups).
        down: whether the shift is negative, shape (halves, groups).
        scale: shape (groups,), not negative.
        found: whether there is one: not where no weight has importance. Shape (groups,).
    """

    level: Bytes
    down: Mask
    scale: Floats
    found: Mask


def best_rounding(x: Floats, w: Floats, halves: int) -> Rounded:
    """Round groups, shape (group size, groups), with importance `w`; each half has a shift of its own, or all one."""
    step = TILE // len(x)
    parts = []
    for start in range(0, x.shape[1], step):
        some, weights = (np.ascontiguousarray(array[:, start : start + step]) for array in (x, w))
        parts.append(_best_rounding(some, weights, halves))
    return Rounded(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)))


def _best_rounding(x: Floats, w: Floats, halves: int) -> Rounded:
    """One tile of groups.

    The comparison of C's loop is rounded, so that of splits which are nearly equal the order decides. Only those near
    the top can matter: they are compared in that order.
    """
    size, n = x.shape
    order = in_order(x)
    at = order * np.intp(n) + np.arange(n)
    sums = sorted_sums(x, w, order, at, halves)
    first, second, combination, group = near_top(sums)
    exact = exact_sums_of_one if halves == 1 else exact_sums_of_two
    sum_qx, sum_q2 = exact(sums, first, second, combination, group)
    chosen = winners(group, sum_qx, sum_q2, np.full(n, -FLT_MAX, np.float32))
    won = np.flatnonzero(chosen >= 0)
    scale, bounds, down = np.zeros(n, np.float32), np.zeros((2, n), np.intp), np.zeros((halves, n), np.bool_)
    chosen = chosen[won]
    scale[won] = sum_qx[chosen] / sum_q2[chosen]
    bounds[:, won] = first[chosen], second[chosen]
    down[:, won] = combination[chosen] >> np.arange(halves)[::-1, None] & 1
    level = np.empty((size, n), np.uint8)
    level.reshape(-1)[at] = (np.arange(size)[:, None, None] >= bounds).sum(axis=1, dtype=np.uint8)
    negative = scale < 0
    level[:, negative] = 2 - level[:, negative]
    found = np.zeros(n, np.bool_)
    found[won] = True
    return Rounded(level, down ^ negative, np.abs(scale), found)


def in_order(x: Floats) -> Bytes:
    """Places of weights (size, groups), the smallest of each group first, of equals the first first."""
    keys = (x + f32(0)).view(np.int32)  # there is no -0 now
    keys ^= (keys >> 31) & 0x7FFFFFFF
    numbered = keys.T.astype(np.int64) << 8
    numbered |= np.arange(len(x))
    numbered.sort(axis=1)
    return np.ascontiguousarray(numbered.T.astype(np.uint8))


def sorted_sums(x: Floats, w: Floats, order: Bytes, at: Ints, halves: int) -> Sums:
    """Running sums of weights (size, groups) in an order; `at` is where they are."""
    size, n = x.shape
    sums = Sums(*(scratch(name, (halves, size + 1, n)) for name in ("sums x", "sums w")))
    for out, array in ((sums.x, w * x), (sums.w, w)):
        terms = array.take(at).view(np.int32)
        for half in range(halves):
            mine = terms if halves == 1 else terms & -(order >> 3 == half).view(np.int8)  # the others are 0
            out[half, 0] = 0
            for k, term in enumerate(mine.view(np.float32)):
                np.add(out[half, k], term, out=out[half, k + 1])
    return sums


class Scores:
    """What all splits of groups explain of them, but for rounding: sum(w q x)^2 / sum(w q^2).

    Both sums are what depends on the first boundary and what depends on the second.

    Attributes:
        first_x, first_w: shape (combinations of shifts, size + 1, groups), or the same for all.
        second_x, second_w: shape (combinations of shifts, size + 1, groups).
    """

    def __init__(self, sums: Sums) -> None:
        shifts = [(v,) for v in (UP, DOWN)] if len(sums.x) == 1 else [(a, b) for a in (UP, DOWN) for b in (UP, DOWN)]
        shape = len(shifts), *sums.x.shape[1:]
        self.first_w, self.second_x, self.second_w = (
            scratch(name, shape) for name in ("first w", "second x", "second w")
        )
        self.first_x = sums.x.sum(axis=0)
        for k, combination in enumerate(shifts):
            total = sum(x[-1] * v[2] for x, v in zip(sums.x, combination, strict=True))
            np.subtract(total, self.first_x, out=self.second_x[k])
            self.first_w[k] = self.second_w[k] = 0
            for w, v in zip(sums.w, combination, strict=True):
                self.first_w[k] += w * (v[0] * v[0] - v[1] * v[1])
                self.second_w[k] += (w[-1] - w) * (v[2] * v[2]) + w * (v[1] * v[1])

    def best_seconds(self) -> Floats:
        """The best score for each first boundary and combination: shape (size + 1, combinations, groups)."""
        combinations, rows, n = self.second_x.shape
        best = np.empty((rows, combinations, n), np.float32)
        for i in range(rows):
            shape = combinations, rows - i, n
            score, sum_q2 = scratch("score", shape), scratch("sum q2", shape)
            np.subtract(self.second_x[:, i:], self.first_x[i], out=score)
            np.square(score, out=score)
            np.add(self.second_w[:, i:], self.first_w[:, None, i], out=sum_q2)
            score /= sum_q2
            score.max(axis=1, out=best[i])
        return best

    def of(self, first: Ints, combination: Ints, group: Ints) -> Floats:
        """Scores for all second boundaries, shape (size + 1, ...)."""
        _, rows, n = self.second_x.shape
        at = (combination * rows + np.arange(rows)[:, None]) * n + group
        sum_qx = self.second_x.take(at) - self.first_x.take(first * n + group)
        score: Floats = (
            sum_qx * sum_qx / (self.second_w.take(at) + self.first_w.take((combination * rows + first) * n + group))
        )
        return score


def near_top(sums: Sums) -> tuple[Ints, Ints, Ints, Ints]:
    """First and second boundaries, combinations of shifts and groups of the splits that could be the best.

    In the order of the groups, and for each of them in that of C's loops.
    """
    scores = Scores(sums)
    best, weight = scores.best_seconds(), sums.w[:, -1].sum(axis=0)
    top = best.max(axis=(0, 1))
    least_q2, most_q2 = weight * (DELTA * DELTA), weight * (UP[2] * UP[2])
    normal = (top * least_q2 > LEAST) & (top * most_q2 < MOST)  # else rounding is too coarse to leave any out
    least = np.where(normal, top * CLOSE, f32(-np.inf))
    near = ~(best < least)
    near[..., ~(weight > 0)] = False
    row, group = np.divmod(np.flatnonzero(near), near.shape[2])
    first, combination = np.divmod(row, near.shape[1])
    score = scores.of(first, combination, group)
    score[np.arange(len(score))[:, None] < first] = -np.inf
    second, which = np.divmod(np.flatnonzero(~(score < least[group])), len(group))
    first, combination, group = first[which], combination[which], group[which]
    rows = len(score)
    order = (((group * rows + first) * rows + second) * len(scores.second_x) + combination).argsort()
    return first[order], second[order], combination[order], group[order]


def exact_sums_of_one(sums: Sums, first: Ints, second: Ints, combination: Ints, group: Ints) -> tuple[Floats, Floats]:
    """Sums of w * q * x and w * q^2 of splits of IQ1_S: one shift for the group, up or down."""
    found = []
    v0, v1, v2 = np.stack([UP, DOWN]).T[:, combination]
    for (s,), squared in ((sums.x, False), (sums.w, True)):
        low, middle, high = s[first, group], s[second, group] - s[first, group], s[-1, group] - s[second, group]
        if squared:
            found.append(low * v0 * v0 + middle * v1 * v1 + high * v2 * v2)
        else:
            found.append(low * v0 + middle * v1 + high * v2)
    return found[0], found[1]


def exact_sums_of_two(sums: Sums, first: Ints, second: Ints, combination: Ints, group: Ints) -> tuple[Floats, Floats]:
    """Sums of w * q * x and w * q^2 of splits of IQ1_M: each half of the group has a shift of its own."""
    sum_qx, sum_q2 = [], []
    for half, (sx, sw) in enumerate(zip(sums.x, sums.w, strict=True)):
        v0, v1, v2 = np.stack([UP, DOWN]).T[:, combination >> (1 - half) & 1]
        sum_qx.append(sx[-1, group] * v2 - (sx[first, group] + sx[second, group]))
        low, middle = v0 * v0 - v1 * v1, v1 * v1 - v2 * v2
        sum_q2.append(sw[-1, group] * v2 * v2 + sw[first, group] * low + sw[second, group] * middle)
    return sum_qx[0] + sum_qx[1], sum_q2[0] + sum_q2[1]
