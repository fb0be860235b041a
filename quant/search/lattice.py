"""Scale and grid points of each group: the search of the IQ2 and IQ3 types."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, f32, scratch, winners
from gguforge.quant.search.grids import Grid
from gguforge.quant.search.nearest import Indices, Ints
from gguforge.quant.search.points import LatticePoints, Runs

Bytes = NDArray[np.uint8]
CLOSE = f32(1 - 3e-4)  # of the sums of candidates in any order: those which C's order could make the best
LEAST, MOST = f32(1e-30), f32(1e37)  # between them products keep all their bits

# Which points are rounded again with the scale that was found: those of the kept rounding that were not on the grid,
# all of a group with such a point, or all.
Again = Literal["off points", "off groups", "all"]


def magnitudes(x: Floats, w: Floats | None) -> tuple[Floats, Bytes]:
    """|x| of groups, and the signs of each eight weights as bits, shape (group size / 8, groups).

    With `w`, the signs of eight have even parity (the last bit is not stored): where it is odd, the weight that matters
    least changes its sign, and its magnitude is negative.
    """
    size = scratch("magnitude", x.shape)
    np.abs(x, out=size)
    negative = (x < 0).reshape(-1, 8, x.shape[1])
    signs: Bytes = np.packbits(negative, axis=1, bitorder="little")[:, 0]
    if w is not None:
        eights, odd = np.nonzero(np.bitwise_xor.reduce(negative, axis=1))
        cost = (w * x * x).reshape(negative.shape)[eights, :, odd]
        least = cost.argmin(axis=1)
        size.reshape(negative.shape)[eights, least, odd] *= f32(-1)
        signs[eights, odd] ^= (1 << least).astype(np.uint8)
        signs &= np.uint8(127)
    return size, signs


class GridFit:
    """Scale and grid points of each group: |x| ~ scale * (2 * level + 1).

    Equals the searches of `quantize_row_iq2_*_impl` and `quantize_row_iq3_*_impl`. Each candidate puts the largest
    weight near the highest level; lattice points that are not on the grid give way to
    a neighbour that is. The weighted least-squares scale is kept if it explains more of the group than the best so far.

    Args:
        x: magnitudes, shape (group size, groups); a few may be negative.
        w: importance of each weight, same shape.
        grid: the grid.
        candidates: what the largest weight is divided by to make the scale, float32.
        top: the largest weight of each group, positive, shape (groups,).
        again: which points are rounded a last time.
        scale: the scale where no candidate wins, shape (groups,).

    Attributes:
        scale: shape (groups,); may be negative; no number where C would give up.
        index: grid points, shape (group size / 8 or 4, groups).
    """

    def __init__(
        self, x: Floats, w: Floats, grid: Grid, candidates: Floats, top: Floats, again: Again, scale: Floats
    ) -> None:
        self.x, self.w, self.grid = x, w, grid
        self.wx = np.multiply(w, x, out=scratch("wx", x.shape))
        self.root = np.sqrt(w, out=scratch("root", x.shape))
        self.scale = scale
        inverse = candidates / top[:, None]
        points = LatticePoints(grid, x, self.root, inverse, f32(1) / inverse)
        self.index: Indices = np.zeros(points.codes.shape[:2], np.int16)
        on_grid = np.full(self.index.shape, again != "off groups")
        self._choose(points, on_grid)
        self.broken: Mask = np.logical_or.reduce(points.broken, axis=0)
        if again == "off groups":
            on_grid &= on_grid.all(axis=0)
        elif again == "all":
            on_grid[...] = False
        self._round_again(on_grid)
        self.scale[self.broken] = np.nan

    def _choose(self, points: LatticePoints, on_grid: Mask) -> None:
        """Keep the candidate that C's loop ends with: each replaces the best so far if it explains more of the group.

        Only candidates near the top can matter. They are found from sums in any order; those in C's order decide.
        """
        runs = points.runs()
        cells = self._near_top(points, runs)
        group = cells // points.scale.shape[1]
        every = np.repeat(runs.index, np.diff(runs.start, append=points.codes.size)).reshape(len(points.codes), -1)
        codes = points.codes.reshape(every.shape)
        index = every.take(cells, axis=1)
        sum_qx, sum_q2 = self._sums(self.wx.take(group, axis=1), self.w.take(group, axis=1), index)
        chosen = winners(group, sum_qx, sum_q2, np.zeros(len(self.scale), np.float32))
        won = np.flatnonzero(chosen >= 0)
        chosen = chosen[won]
        self.scale[won] = sum_qx[chosen] / sum_q2[chosen]
        self.index[:, won] = index[:, chosen]
        on_grid[:, won] = self.grid.index[codes[:, cells[chosen]]] >= 0

    def _near_top(self, points: LatticePoints, runs: Runs) -> Ints:
        """Cells group * candidates + candidate of the candidates that could be the best, in order."""
        of_runs = self._run_sums(points, runs)
        sums = np.zeros(points.scale.size, np.complex64)
        bounds = np.searchsorted(runs.start, np.arange(len(points.codes) + 1) * points.scale.size)
        for a, b in pairwise(bounds):
            times = np.diff(runs.start[a:b], append=(runs.start[a] // points.scale.size + 1) * points.scale.size)
            sums += of_runs[a:b].repeat(times)
        sum_qx, sum_q2 = (np.ascontiguousarray(part).reshape(points.scale.shape) for part in (sums.real, sums.imag))
        score = sum_qx * sum_qx / sum_q2
        top = score.max(axis=1)
        normal = (top * sum_q2.min(axis=1) > LEAST) & (top * sum_q2.max(axis=1) < MOST)
        normal &= np.abs(sum_qx).min(axis=1) >= f32(0.5) * np.abs(self.wx).sum(axis=0)  # little has cancelled out
        near = ~(score < np.where(normal, top * CLOSE, f32(-np.inf))[:, None])
        return np.flatnonzero(near & runs.new)  # the same once more would change nothing

    def _run_sums(self, points: LatticePoints, runs: Runs) -> NDArray[np.complex64]:
        """Sums of w * x * q and, as imaginary parts, of w * q^2 over a point, for each run.

        Both in one number, so that they are looked up together; they are only added, and multiplied part by part.
        """
        point = runs.start // points.scale.shape[1]
        size, n = len(self.grid.place), self.x.shape[1]
        at = point // n * (size * n) + point % n
        weights = np.empty(self.x.size, np.complex64)
        weights.real, weights.imag = self.wx.reshape(-1), self.w.reshape(-1)
        sums = np.zeros(len(point), np.complex64)
        terms, total = np.empty_like(sums), sums.view(np.float32)
        for powers in self.grid.powers:
            powers.take(runs.index, out=terms, mode="clip")
            total += np.multiply(weights.take(at).view(np.float32), terms.view(np.float32), out=terms.view(np.float32))
            at += n
        return sums

    def _sums(self, wx: Floats, w: Floats, index: Indices) -> tuple[Floats, Floats]:
        """Sums of w * x * q and of w * q^2 for grid points q of each group, in order."""
        q, t = np.empty_like(w), np.empty_like(w)
        size = len(self.grid.place)
        for k, row in enumerate(index):
            self.grid.lattice.take(row, axis=1, out=q[k * size : (k + 1) * size], mode="clip")
        sum_qx = add_up(np.multiply(wx, q, out=t))
        np.multiply(w, q, out=t)
        return sum_qx, add_up(np.multiply(t, q, out=t))

    def _round_again(self, done: Mask) -> None:
        """Round the points that are not `done` with the scale found, then fit the scale of their groups to them."""
        groups = np.flatnonzero(~done.all(axis=0) & (self.scale > 0))
        if not len(groups):
            return
        x, w, wx, root = (array.take(groups, axis=1) for array in (self.x, self.w, self.wx, self.root))
        scale = self.scale[groups]
        points = LatticePoints(self.grid, x, root, f32(1) / scale[:, None], scale[:, None])
        found = points.runs(done[:, groups]).index.reshape(len(done), -1)
        index = np.where(done[:, groups], self.index[:, groups], found)
        sum_qx, sum_q2 = self._sums(wx, w, index)
        self.index[:, groups] = index
        self.scale[groups] = np.where(sum_q2 > 0, sum_qx / sum_q2, scale)
        self.broken[groups] |= np.logical_or.reduce(points.broken, axis=0)
