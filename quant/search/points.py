"""Groups as lattice points, rounded for several scales; and the grid points that these are moved to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gguforge.quant.search.base import MAGIC, Floats, Mask, f32, scratch
from gguforge.quant.search.grids import Grid
from gguforge.quant.search.lines import NONE, Lines, inside
from gguforge.quant.search.nearest import Indices, Ints, Points, as_points, batches, nearest_in_order

TWICE = f32(2) * MAGIC  # adding it rounds a float to the nearest even integer
SAFE = f32(1 << 22)  # beyond it C's rounding wraps around
FEW = 32  # runs that are not worth a batch


@dataclass(frozen=True)
class Runs:
    """Stretches of candidates for which a point keeps its grid point.

    Attributes:
        start: the first cell of each, in order; cell = (point * groups + group) * candidates + candidate.
        index: grid points.
        new: whether any run of a group starts with the candidate, shape (groups, candidates).
    """

    start: Ints
    index: Indices
    new: Mask


@dataclass(frozen=True)
class Board:
    """What is known of the cells, shape (cells,): whether a run starts there, and then its grid point or NONE."""

    starts: Mask
    index: Indices

    def mark(self, cells: Ints, index: Indices) -> None:
        """Let runs start."""
        self.starts[cells] = True
        self.index[cells] = index


class LatticePoints:
    """Groups as points of 8 (or 4) weights, rounded to the lattice for several scales: the candidates.

    Args:
        grid: the grid.
        x: magnitudes, shape (group size, groups).
        root: square roots of their importance, same shape.
        inverse: reciprocals of the scales, rising from candidate to candidate, shape (groups, candidates).
        scale: their reciprocals, same shape.

    Attributes:
        codes: lattice points, shape (points of a group, groups, candidates).
        broken: points with no grid point at a finite distance: there C gives up; shape (points of a group, groups).
    """

    def __init__(self, grid: Grid, x: Floats, root: Floats, inverse: Floats, scale: Floats) -> None:
        self.grid, self.scale = grid, scale
        reach = np.maximum(x.max(axis=0), -x.min(axis=0))
        wild = ~(reach[:, None] * inverse < SAFE)
        self.wild = np.logical_or.reduce(wild, axis=1)
        self.inverse = np.where(self.wild[:, None], f32(np.nan), inverse)
        self.codes = self._round(x, inverse, np.logical_or.reduce(wild, axis=0))
        self.x, self.root = as_points(x, len(grid.place)), as_points(root, len(grid.place))
        self.broken: Mask = np.zeros(self.codes.shape[:2], np.bool_)

    def _round(self, x: Floats, inverse: Floats, wild: Mask) -> Indices:
        """Codes of the lattice points: of each weight the level nearest to (inverse * x - 1) / 2."""
        size, base, n = len(self.grid.place), self.grid.top + 1, x.shape[1]
        codes = np.empty((len(x) // size, *inverse.shape), np.int16)
        t = scratch("steps", x.shape)
        bits = t.view(np.int32)
        digits = bits.reshape(-1, size, n)
        for k in range(inverse.shape[1]):
            np.multiply(x, np.ascontiguousarray(inverse[:, k]), out=t)
            t -= f32(1)
            t += TWICE  # what is left are multiples of 2: in the last bits of the float is the level
            if wild[k]:
                bits &= 0x7FFFFF
                bits -= 0x400000
                bits.clip(0, base - 1, out=bits)
            else:
                t.clip(TWICE, TWICE + f32(2 * base - 2), out=t)
            code = digits[:, -1].copy()
            for place in range(size - 2, -1, -1):
                code *= base
                code += digits[:, place]
            codes[..., k] = code  # the exponent of the float is cut off
        return codes

    def runs(self, done: Mask | None = None) -> Runs:
        """The grid points of all candidates: those with the codes of the lattice points, or the nearest.

        While a lattice point stays the same from candidate to candidate, of two grid points the one that is nearer at
        both ends is nearer between (see `Lines`). So only the ends are searched, and where they differ, the change.

        Args:
            done: points that need none, shape (points of a group, groups).
        """
        starts = np.empty(self.codes.shape, np.bool_)
        starts[..., 0] = True
        np.not_equal(self.codes[..., 1:], self.codes[..., :-1], out=starts[..., 1:])
        starts[:, self.wild] = True
        board = Board(starts.reshape(-1), np.empty(starts.size, np.int16))
        start = np.flatnonzero(board.starts)
        index = self.grid.index.take(self.codes.reshape(-1).take(start))
        if done is not None:
            index[done.reshape(-1)] = 0
        board.index[start] = index
        off = np.flatnonzero(index < 0)
        self._settle(start.take(off), np.append(start[1:], starts.size).take(off) - 1, board)
        start = np.flatnonzero(board.starts)
        index = board.index.take(start)
        self._look_closely(start, index)
        return Runs(start, index, np.logical_or.reduce(starts, axis=0))

    def _settle(self, first: Ints, last: Ints, board: Board) -> None:
        """Find the grid points of runs from cell to cell with the same lattice point; NONE where they are in doubt."""
        while len(first) > FEW:
            counts = self.grid.shortlists.counts.take(self.codes.reshape(-1).take(first))
            order = counts.argsort(kind="stable")
            first, last = first.take(order), last.take(order)
            open_ = [self._split(first[part], last[part], board) for part in batches(counts.take(order))]
            first, last = np.concatenate(open_, axis=1)
        for a, b in zip(first, last, strict=True):
            board.mark(np.arange(a, b + 1), np.array(NONE, np.int16))

    def _split(self, first: Ints, last: Ints, board: Board) -> Ints:
        """The same for one batch, but where more than two grid points take turns.

        If the same grid point is nearest at both ends, it is so between. If not, look where the two change places; or,
        where an end is too close to call, beside it.

        Returns:
            first and last cells of runs that are still open, shape (2, runs).
        """
        point, code, at = first // self.scale.shape[1], self.codes.reshape(-1).take(first), first % self.scale.size
        x, scale = self.x.take(point, axis=1), self.scale.reshape(-1)
        lines = Lines(self.grid, x, self.root.take(point, axis=1), code)
        ends = np.stack([at, at + (last - first)]) if self.scale.shape[1] > 1 else at[None]
        rank = lines.nearest(scale.take(ends))
        rank[~inside(self.grid, x, self.inverse.reshape(-1).take(ends))] = NONE
        board.mark(first, lines.points(rank[0]))
        differ = np.flatnonzero(((rank[0] != rank[-1]) | (rank[0] < 0)) & (first < last))
        if not len(differ):
            return np.empty((2, 0), np.intp)
        first, last, at, rank = first.take(differ), last.take(differ), at.take(differ), rank.take(differ, axis=1)
        lines = lines.take(differ)
        board.mark(last, lines.points(rank[1]))
        middle = self._between(at, last - first, rank, lines)
        near = lines.nearest(scale.take(np.stack([at + middle, at + middle + 1])))
        middle += first
        some = np.flatnonzero(middle + 1 < last)
        board.mark(middle.take(some) + 1, lines.points(near[1]).take(some))
        differs = (rank != near) | (near < 0)
        left, right = np.flatnonzero(differs[0] & (first < middle)), np.flatnonzero(differs[1] & (middle + 1 < last))
        return np.stack([np.append(first[left], middle[right] + 1), np.append(middle[left], last[right])])

    def _between(self, at: Ints, span: Ints, rank: Indices, lines: Lines) -> Ints:
        """Of runs from cell `at` to at + span: after which, probably, another grid point is nearest, 0 .. span - 1."""
        inverse = self.inverse.reshape(-1)
        start, stop, cells = inverse.take(at), inverse.take(at + span), span.astype(np.float32)
        steps = (f32(1) / lines.crossing(rank) - start) / (stop - start) * cells
        steps[rank[0] < 0], steps[rank[1] < 0] = 0, np.inf
        middle: Ints = np.fmax(np.fmin(steps, cells - f32(1)), f32(0)).astype(np.intp)
        return middle

    def _look_closely(self, cells: Ints, index: Indices) -> None:
        """Find the grid points of cells where it is in doubt, with sums in C's order."""
        doubtful = np.flatnonzero(index < 0)
        cells = cells.take(doubtful)
        point = cells // self.scale.shape[1]
        scale, codes = self.scale.reshape(-1).take(cells % self.scale.size), self.codes.reshape(-1).take(cells)
        points = Points(self.x.take(point, axis=1), self.root.take(point, axis=1), scale, codes.astype(np.intp))
        found = nearest_in_order(self.grid, points, self.grid.lists)
        self.broken.reshape(-1)[point[found < 0]] = True
        index[doubtful] = np.maximum(found, 0)
