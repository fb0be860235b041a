"""Which grid point is nearest, for all scales at once: the distance to each as a line."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, f32, scratch
from gguforge.quant.search.grids import Grid
from gguforge.quant.search.nearest import BORDER, LEAST_MARGIN, MOST, Indices, Ints, only, pairs

MARGIN = f32(8e-6)  # of the terms of a squared distance: more than rounding can amount to
NONE = -1  # the rank where it is too close to call


class Lines:
    """The grid points that could be nearest to points which were rounded to a lattice point that is not on the grid.

    The weighted squared distance of a point x to the grid point q, for the scale s, is s (s A - B) and a constant, with
    A the sum of r q^2 and B that of 2 r x q: a line, divided by s. So of two grid points the one that is nearer for two
    scales is nearer for all between.

    Args:
        grid: the grid.
        x: magnitudes, shape (8 or 4, points).
        root: their importance in this comparison, same shape.
        codes: of the lattice points, those with short lists first, shape (points,).
    """

    def __init__(self, grid: Grid, x: Floats, root: Floats, codes: Indices) -> None:
        self.grid, self.codes = grid, codes
        counts = grid.shortlists.counts.take(codes)
        shape = int(counts[-1]), len(codes)
        self.a, self.b, q = (pairs(name, shape) for name in ("a", "b", "q"))
        packed, digits = pairs("packed", shape).view(np.int32), pairs("digits", shape).view(np.int32)
        grid.shortlists.packed[: shape[0]].take(codes, axis=1, out=packed, mode="clip")
        self.a[...] = self.b[...] = 0
        twice = np.multiply(root, x, out=scratch("twice", x.shape))
        self.rest = np.multiply(twice, x, out=scratch("rest", x.shape)).sum(axis=0)
        twice *= f32(2)
        for i, r in enumerate(root):
            np.right_shift(packed, np.int32(4 * i), out=digits)
            digits &= np.int32(15)
            q[...] = digits
            t = np.multiply(q, twice[i], out=digits.view(np.float32))
            self.b += t
            q *= q
            q *= r
            self.a += q
        short = int(counts[0])
        self.b[short:][np.arange(short, shape[0])[:, None] >= counts] = -np.inf  # never the nearest
        self.size = self.a.max(axis=0)

    def take(self, which: Ints) -> Lines:
        """Those of some of the points."""
        some = copy(self)
        some.a, some.b = self.a.take(which, axis=1), self.b.take(which, axis=1)
        some.rest, some.size, some.codes = self.rest.take(which), self.size.take(which), self.codes.take(which)
        return some

    def points(self, rank: Indices) -> Indices:
        """Grid points with given ranks, shape (points,); NONE stays."""
        return np.where(rank < 0, rank, self.grid.shortlists.point(rank, self.codes))

    def nearest(self, scale: Floats) -> Indices:
        """The ranks of the nearest in the lists, NONE where another is nearly as near, for scales (2, points)."""
        shape = len(self.a), *scale.shape
        line = np.multiply(self.a[:, None], scale, out=pairs("line", shape))
        line -= self.b[:, None]
        margin = MARGIN * (scale * self.size + self.rest / scale)
        rank, clear = only(line <= line.min(axis=0) + margin)
        clear &= (margin * scale > LEAST_MARGIN) & (scale * scale * self.size + self.rest < MOST)
        ranks: Indices = np.where(clear, rank.astype(np.int16), np.int16(NONE))
        return ranks

    def crossing(self, rank: Indices) -> Floats:
        """The scale for which two grid points are equally near, given their ranks, shape (2, points) -> (points,)."""
        at = rank * np.intp(len(self.size)) + np.arange(len(self.size))
        (a, other_a), (b, other_b) = self.a.take(at, mode="clip"), self.b.take(at, mode="clip")
        scale: Floats = (b - other_b) / (a - other_a)
        return scale


def inside(grid: Grid, x: Floats, inverse: Floats) -> NDArray[np.bool_]:
    """Whether no weight is so near to a border between levels that rounding could have moved it across.

    Args:
        x: magnitudes, shape (8 or 4, points).
        inverse: what they were multiplied by, shape (2, points); no number: never.
    """
    t = np.multiply(x[:, None], inverse * f32(0.5), out=scratch("steps", (len(x), *inverse.shape)))
    t.clip(f32(0.5), f32(grid.top + 0.5), out=t)
    t -= np.rint(t, out=scratch("border", t.shape))
    clear: NDArray[np.bool_] = np.abs(t, out=t).min(axis=0) > BORDER
    return clear
