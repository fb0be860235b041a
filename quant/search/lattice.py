"""Scale and grid points of each group: the search of the IQ2 and IQ3 types."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, f32, round_into, scratch
from gguforge.quant.search.grids import Grid

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int16]
FLT_MAX = np.finfo(np.float32).max
SAFE = f32(1 << 22)  # beyond it C's rounding wraps around
PAIRS = 1 << 13  # of points and neighbours compared at once

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


def nearest_points(
    grid: Grid, x: Floats, root: Floats, scale: Floats, codes: NDArray[np.intp], shift: Floats | None = None
) -> Indices:
    """The best of the grid points near each lattice point that is not on the grid. Equals `iq*_find_best_neighbour`.

    Args:
        x: magnitudes, shape (8 or 4, points).
        root: square roots of their importance, same shape.
        scale: shape (points,).
        codes: of the lattice points, shape (points,).
        shift: with it (IQ1) levels stand for level - 1 + shift, instead of their places on the lattice.

    Returns:
        shape (points,); -1 where no distance is a finite number.
    """
    near = grid.neighbours
    counts = near.counts[codes]
    order = counts.argsort(kind="stable")  # so that points compared at once have about as many neighbours
    counts, starts = counts[order], near.starts[codes[order]]
    x, root, scale = x.take(order, axis=1), root.take(order, axis=1), scale[order]
    shift = None if shift is None else shift[order]
    best = np.empty(len(codes), np.int16)
    at = 0
    while at < len(codes):
        end = min(len(codes), at + max(1, PAIRS // int(counts[at])))
        end = min(end, at + max(1, PAIRS // int(counts[end - 1])))
        ranks = np.arange(counts[end - 1])[:, None]
        place = starts[at:end] + ranks
        part = slice(at, end)
        here = None if shift is None else shift[part]
        d2 = _distances(near.packed.take(place, mode="clip"), x[:, part], root[:, part], scale[part], here)
        d2[ranks >= counts[at:end]] = np.inf
        least = d2.min(axis=0)
        first = (d2 == least).argmax(axis=0)
        found = near.points[starts[at:end] + first]
        best[order[at:end]] = np.where(least < FLT_MAX, found, -1)
        at = end
    return best


def _distances(packed: NDArray[np.int32], x: Floats, root: Floats, scale: Floats, shift: Floats | None) -> Floats:
    """Weighted squared distances, shape (ranks, points), of grid points to points of the same columns."""
    d2 = np.zeros(packed.shape, np.float32)
    t, u = np.empty_like(d2), np.empty_like(d2)
    for i in range(len(x)):
        t[...] = packed >> np.int32(4 * i) & np.int32(15)
        if shift is not None:
            t -= f32(3)
            t *= f32(0.5)
            t += shift
        np.multiply(t, scale, out=t)
        np.subtract(t, x[i], out=t)
        np.multiply(t, root[i], out=u)
        np.multiply(u, t, out=u)
        np.add(d2, u, out=d2)
    return d2


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
        self.reach = np.maximum(x.max(axis=0), -x.min(axis=0))
        shape = len(x) // len(grid.place), x.shape[1]
        self.index: Indices = np.zeros(shape, np.int16)
        on_grid = np.full(shape, again != "off groups")
        best = np.zeros(x.shape[1], np.float32)
        self.broken = np.zeros(x.shape[1], np.bool_)
        q, t = scratch("q", x.shape), scratch("t", x.shape)
        for candidate in candidates:
            inverse = candidate / top
            index, on = self._points(x, self.root, self.reach, inverse, f32(1) / inverse, self.broken, q)
            sum_qx, sum_q2 = self._sums(self.wx, w, q, t)
            won = np.flatnonzero((sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2))
            scale[won] = sum_qx[won] / sum_q2[won]
            best[won] = scale[won] * sum_qx[won]
            self.index[:, won], on_grid[:, won] = index[:, won], on[:, won]
        if again == "off groups":
            on_grid &= on_grid.all(axis=0)
        elif again == "all":
            on_grid[...] = False
        self._round_again(on_grid)
        self.scale[self.broken] = np.nan

    @staticmethod
    def _sums(wx: Floats, w: Floats, q: Floats, t: Floats) -> tuple[Floats, Floats]:
        """Sums of w * x * q and of w * q^2."""
        sum_qx = add_up(np.multiply(wx, q, out=t))
        np.multiply(w, q, out=t)
        return sum_qx, add_up(np.multiply(t, q, out=t))

    def _points(
        self, x: Floats, root: Floats, reach: Floats, inverse: Floats, scale: Floats, broken: Mask, q: Floats
    ) -> tuple[Indices, Mask]:
        """Grid points for one scale, and which of them were hit at once.

        Fills in `q`, their places on the lattice, and sets `broken` where there is no nearest point. `reach` is the
        largest magnitude of each group.
        """
        grid, n = self.grid, x.shape[1]
        np.multiply(x, inverse, out=q)
        q -= f32(1)
        q *= f32(0.5)
        round_into(q, 0, grid.top, finite=bool((reach * inverse < SAFE).all()))
        digits = q.reshape(-1, len(grid.place), n)
        code = digits[:, -1].copy()
        for i in range(len(grid.place) - 2, -1, -1):
            code *= f32(grid.top + 1)
            code += digits[:, i]
        codes = code.astype(np.int16).astype(np.intp)
        q *= f32(2)
        q += f32(1)
        index: Indices = grid.index.take(codes)
        on = index >= 0
        off = np.flatnonzero(~on)
        if len(off):
            group = off % n
            first = off + off // n * ((len(grid.place) - 1) * n)  # where the first weight of a point is
            places = first + np.arange(len(grid.place))[:, None] * n
            found = nearest_points(grid, x.take(places), root.take(places), scale[group], codes.ravel()[off])
            broken[group[found < 0]] = True
            index.reshape(-1)[off] = np.maximum(found, 0)
            q.put(places, grid.lattice.take(found, axis=1))
        return index, on

    def _round_again(self, done: Mask) -> None:
        """Round the points that are not `done` with the scale found, then fit the scale of their groups to them."""
        groups = np.flatnonzero(~done.all(axis=0) & (self.scale > 0))
        if not len(groups):
            return
        x, w, wx, root = (array.take(groups, axis=1) for array in (self.x, self.w, self.wx, self.root))
        scale, broken, q = self.scale[groups], np.zeros(len(groups), np.bool_), np.empty_like(x)
        found, _ = self._points(x, root, self.reach[groups], f32(1) / scale, scale, broken, q)
        index = np.where(done[:, groups], self.index[:, groups], found)
        q[...] = self.grid.lattice.T[index].swapaxes(1, 2).reshape(x.shape)
        sum_qx, sum_q2 = self._sums(wx, w, q, np.empty_like(x))
        self.index[:, groups] = index
        self.scale[groups] = np.where(sum_q2 > 0, sum_qx / sum_q2, scale)
        self.broken[groups] |= broken
