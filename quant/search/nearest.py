"""The nearest of the grid points around a lattice point that is not on the grid. Equals `iq*_find_best_neighbour*`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, f32, scratch
from gguforge.quant.search.grids import COLUMNS, Grid, Lists

Ints = NDArray[np.intp]
Indices = NDArray[np.int16]
FLT_MAX = np.finfo(np.float32).max
MARGIN = f32(2e-5)  # of a squared distance: more than rounding can amount to
LEAST_MARGIN, MOST = f32(1e-30), f32(1e30)  # beyond them rounding is too coarse
BORDER = f32(1e-5)  # of a step between levels: more than rounding can amount to
PAIRS = 1 << 15  # of points and neighbours compared at once


class Points(NamedTuple):
    """Points of 8 (or 4) weights, rounded to the lattice.

    Attributes:
        x: magnitudes, shape (8 or 4, points).
        root: their importance in this comparison, same shape.
        scale: shape (points,).
        codes: of the lattice points, shape (points,).
        shift: with it (IQ1) levels stand for level - 1 + shift, not for their places on the lattice; shape (points,).
    """

    x: Floats
    root: Floats
    scale: Floats
    codes: Ints
    shift: Floats | None = None

    def take(self, which: Ints) -> Points:
        """Some of the points."""
        x, root = self.x.take(which, axis=1), self.root.take(which, axis=1)
        shift = None if self.shift is None else self.shift.take(which)
        return Points(x, root, self.scale.take(which), self.codes.take(which), shift)


def as_points(x: Floats, size: int) -> Floats:
    """Groups (group size, groups) as points of `size` weights: (size, points), the first point of each group first."""
    points = np.empty((size, x.size // size), np.float32)
    points.reshape(size, -1, x.shape[1])[...] = x.reshape(-1, size, x.shape[1]).swapaxes(0, 1)
    return points


def pairs(purpose: str, shape: tuple[int, ...]) -> Floats:
    """Working memory for one number of each pair of a point and a neighbour (or two numbers)."""
    size = math.prod(shape)
    return scratch(purpose, (max(size, 2 * PAIRS),))[:size].reshape(shape)


def batches(counts: NDArray[np.int16]) -> Iterator[slice]:
    """Points with ever longer lists in batches: about PAIRS pairs, if all lists are as long as the longest."""
    at = 0
    while at < len(counts):
        some = counts[at : at + PAIRS // int(counts[at])]
        size = max(1, int(np.count_nonzero(np.arange(1, len(some) + 1) * some <= PAIRS)))
        yield slice(at, at + size)
        at += size


def nearest_points(grid: Grid, points: Points, lists: Lists) -> Indices:
    """The best grid points of some lists, shape (points,), -1 where none is at a finite distance.

    Tables tell most of them: the distance is that of the first half of the weights and that of the second.
    """
    counts = lists.counts.take(points.codes)
    order = counts.argsort(kind="stable")
    best, clear = np.empty(len(order), np.int16), np.empty(len(order), np.bool_)
    for batch in batches(counts.take(order)):
        for start in range(batch.start, batch.stop, COLUMNS):
            part = order[start : min(start + COLUMNS, batch.stop)]
            best[part], clear[part] = _tabulated(grid, points.take(part), lists)
    doubtful = np.flatnonzero(~clear)
    if len(doubtful):
        best[doubtful] = nearest_in_order(grid, points.take(doubtful), lists)
    return best


def _tabulated(grid: Grid, points: Points, lists: Lists) -> tuple[Indices, Mask]:
    """The best grid points of lists that become longer, and whether all others are clearly farther.

    The sums are not in C's order, so where another point is nearly as near this is not the answer.
    """
    shape = count, _ = int(lists.counts[points.codes[-1]]), len(points.codes)
    d2, other = pairs("d2", shape), pairs("other", shape)
    place = pairs("place", (count, 2 * len(points.codes))).view(np.intp)
    column = np.arange(len(points.codes), dtype=np.uint16)
    for table, half, out in zip(_tables(grid, points), lists.halves, (d2, other), strict=True):
        place[...] = half[:count].take(points.codes, axis=1, mode="clip") + column
        table.take(place, out=out, mode="clip")
    d2 += other
    least = d2.min(axis=0)
    margin = MARGIN * (least + points.scale * points.scale * points.root.sum(axis=0))
    rank, clear = only(d2 <= least + margin)
    return lists.point(rank, points.codes), clear & (margin > LEAST_MARGIN) & (least < MOST)


def only(near: Mask) -> tuple[NDArray[np.uint8], Mask]:
    """The row of the only one along axis 0, of up to 255 rows, and whether there is just one."""
    ones = near.view(np.uint8)
    single = np.add.reduce(ones, axis=0, dtype=np.uint8) == 1
    ones *= np.arange(len(ones), dtype=np.uint8).reshape(-1, *[1] * (near.ndim - 1))
    return ones.max(axis=0), single


def _tables(grid: Grid, points: Points) -> Floats:
    """Squared distances of each half of the points to all lattice points: shape (2, (half codes + 1) * COLUMNS)."""
    n, base, half = len(points.codes), grid.top + 1, len(points.x) // 2
    levels = np.arange(base, dtype=np.float32)[:, None]
    places = levels * f32(2) + f32(1) if points.shift is None else levels - f32(1) + points.shift
    t = np.subtract(places * points.scale, points.x[:, None], out=scratch("levels", (len(points.x), base, n)))
    np.square(t, out=t)
    t *= points.root[:, None]
    tables = scratch("tables", (2, base**half + 1, COLUMNS))
    for table, terms in zip(tables, (t[:half], t[half:]), strict=True):
        sums = terms[-1]
        for term in terms[-2:0:-1]:
            sums = (sums[:, None] + term).reshape(-1, n)
        table[:-1, :n] = (sums[:, None] + terms[0]).reshape(-1, n)
        table[-1, :n] = np.inf
    return tables.reshape(2, -1)


def nearest_in_order(grid: Grid, points: Points, lists: Lists) -> Indices:
    """The best grid points of some lists, with all distances summed as C sums them; -1 where none is finite."""
    found, counts = np.empty(len(points.codes), np.int16), lists.counts.take(points.codes)
    order = counts.argsort(kind="stable")
    counts = counts.take(order)
    for batch in batches(counts):
        part = order[batch]
        here, ranks = points.take(part), np.arange(counts[batch.stop - 1])[:, None]
        listed = lists.points[: len(ranks)].take(here.codes, axis=1)
        d2 = _distances(grid.packed.take(listed), here)
        d2[ranks >= counts[batch]] = np.inf
        first, column = d2.argmin(axis=0), np.arange(len(part))
        found[part] = np.where(d2[first, column] < FLT_MAX, listed[first, column], -1)
    return found


def _distances(packed: NDArray[np.int32], points: Points) -> Floats:
    """Weighted squared distances, shape (ranks, points), of grid points to points of the same columns."""
    d2, t, u = (pairs(name, packed.shape) for name in ("d2", "near t", "near u"))
    digits = pairs("digits", packed.shape).view(np.int32)
    d2[...] = 0
    for i, (x, root) in enumerate(zip(points.x, points.root, strict=True)):
        np.right_shift(packed, np.int32(4 * i), out=digits)
        digits &= np.int32(15)
        t[...] = digits
        if points.shift is not None:
            t -= f32(3)
            t *= f32(0.5)
            t += points.shift
        t *= points.scale
        t -= x
        np.multiply(t, root, out=u)
        u *= t
        d2 += u
    return d2
