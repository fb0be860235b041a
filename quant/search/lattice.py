"""Scale and grid points of each group: the search of the IQ2 and IQ3 types."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, f32, round_into, scratch
from gguforge.quant.search.grids import COLUMNS, Grid

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int16]
FLT_MAX = np.finfo(np.float32).max
SAFE = f32(1 << 22)  # beyond it C's rounding wraps around
MARGIN = f32(1e-4)  # of a squared distance: far more than rounding can amount to
LEAST_MARGIN, MOST = f32(1e-30), f32(1e30)  # beyond them rounding is too coarse
PAIRS = 1 << 14  # of points and neighbours compared at once

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


def as_points(x: Floats, size: int) -> Floats:
    """Groups (group size, groups) as points of `size` weights: (size, points), the first point of each group first."""
    points = np.empty((size, x.size // size), np.float32)
    points.reshape(size, -1, x.shape[1])[...] = x.reshape(-1, size, x.shape[1]).swapaxes(0, 1)
    return points


class Nearest(NamedTuple):
    """Grid points found, shape (points,), -1 where none is at a finite distance; are all others clearly farther?"""

    best: Indices
    clear: Mask


def nearest_points(
    grid: Grid,
    x: Floats,
    root: Floats,
    which: NDArray[np.intp],
    scale: Floats,
    codes: NDArray[np.intp],
    shift: Floats | None = None,
) -> Nearest:
    """The best of the grid points near lattice points that are not on the grid. Equals `iq*_find_best_neighbour*`.

    Args:
        x: magnitudes, shape (8 or 4, all points).
        root: their importance in this comparison, same shape.
        which: the points to look at (one of them perhaps several times), shape (points,).
        scale: shape (points,).
        codes: of the lattice points, shape (points,).
        shift: with it (IQ1) levels stand for level - 1 + shift, instead of their places on the lattice.
    """
    # Those compared at once have about as many neighbours, and the same where possible: that saves memory traffic.
    order = codes.astype(np.int16).argsort(kind="stable")
    order = order[grid.neighbours.counts[codes[order]].argsort(kind="stable")]
    best, clear = np.empty(len(codes), np.int16), np.empty(len(codes), np.bool_)
    at = 0
    while at < len(codes):
        part = order[at : at + COLUMNS]
        part = part[: max(1, PAIRS // int(grid.neighbours.counts[codes[part[-1]]]))]
        at += len(part)
        here = None if shift is None else shift[part]
        near, far = x.take(which[part], axis=1), root.take(which[part], axis=1)
        best[part], clear[part] = _tabulated(grid, near, far, scale[part], codes[part], here)
    doubtful = order[~clear[order]]
    at = 0
    while at < len(doubtful):
        part = doubtful[at : at + max(1, PAIRS // int(grid.neighbours.counts[codes[doubtful[at]]]))]
        part = part[: max(1, PAIRS // int(grid.neighbours.counts[codes[part[-1]]]))]
        here = None if shift is None else shift[part]
        near, far = x.take(which[part], axis=1), root.take(which[part], axis=1)
        best[part] = _in_order(grid, near, far, scale[part], codes[part], here)
        at += len(part)
    return Nearest(best, clear)


def _tabulated(
    grid: Grid, x: Floats, root: Floats, scale: Floats, codes: NDArray[np.intp], shift: Floats | None
) -> Nearest:
    """The best points from tables: the distance is that of the first half of the weights and that of the second.

    The sums are not in C's order, so the result counts only where no other point is nearly as near.
    """
    near, n = grid.neighbours, len(codes)
    levels = np.arange(grid.top + 1, dtype=np.float32)
    places = levels * f32(2) + f32(1) if shift is None else levels[:, None] - f32(1) + shift
    t = (places.reshape(grid.top + 1, -1) * scale)[None] - x[:, None]  # (weights, levels, points)
    t *= root[:, None] * t
    tables = scratch("tables", (2, (grid.top + 1) ** (len(x) // 2), COLUMNS))
    for table, terms in zip(tables, (t[: len(x) // 2], t[len(x) // 2 :]), strict=True):
        sums = terms[-1]
        for term in terms[-2::-1]:
            sums = (sums[:, None] + term).reshape(-1, n)
        table[:, :n] = sums
    counts = near.counts[codes]
    column, shape = np.arange(n), (int(counts[-1]), n)
    d2, other = _pairs("d2", shape), _pairs("other", shape)
    place, index = (_pairs(name, (*shape, 2)).view(np.int64)[..., 0] for name in ("place", "index"))
    np.add(near.starts[codes], np.arange(counts[-1])[:, None], out=place)
    for table, half, out in zip(tables, near.halves, (d2, other), strict=True):
        np.add(half.take(place, mode="clip"), column, out=index)
        table.reshape(-1).take(index, out=out, mode="clip")
    d2 += other
    ragged = int(counts[0])
    d2[ragged:][np.arange(ragged, counts[-1])[:, None] >= counts] = np.inf
    first = d2.argmin(axis=0)
    least = d2[first, column]
    d2[first, column] = np.inf
    margin = MARGIN * (least + scale * scale * root.sum(axis=0))
    clear = (d2.min(axis=0) > least + margin) & (margin > LEAST_MARGIN) & (least < MOST)
    return Nearest(near.points[near.starts[codes] + first], clear)


def _pairs(purpose: str, shape: tuple[int, ...]) -> Floats:
    """Working memory for one number of each pair of a point and a neighbour (or several numbers)."""
    size = math.prod(shape)
    return scratch(purpose, (2 * PAIRS,))[:size].reshape(shape)


def _in_order(
    grid: Grid, x: Floats, root: Floats, scale: Floats, codes: NDArray[np.intp], shift: Floats | None
) -> Indices:
    """The best points, with the distances summed as C sums them."""
    near = grid.neighbours
    counts, starts = near.counts[codes], near.starts[codes]
    ranks = np.arange(counts.max())[:, None]
    d2 = _distances(near.packed.take(starts + ranks, mode="clip"), x, root, scale, shift)
    d2[ranks >= counts] = np.inf
    first = d2.argmin(axis=0)
    least = d2[first, np.arange(len(codes))]
    found: Indices = np.where(least < FLT_MAX, near.points[starts + first], -1)
    return found


def _distances(packed: NDArray[np.int32], x: Floats, root: Floats, scale: Floats, shift: Floats | None) -> Floats:
    """Weighted squared distances, shape (ranks, points), of grid points to points of the same columns."""
    d2, t, u = (_pairs(name, packed.shape) for name in ("d2", "near t", "near u"))
    digits = _pairs("digits", packed.shape).view(np.int32)
    d2[...] = 0
    for i in range(len(x)):
        np.right_shift(packed, np.int32(4 * i), out=digits)
        digits &= np.int32(15)
        t[...] = digits
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


def all_nearest(grid: Grid, x: Floats, root: Floats, scale: Floats, codes: Indices) -> Indices:
    """Grid points for all candidates: those with the codes of the lattice points, or the nearest.

    For a lattice point that stays the same from one candidate to the next, the distance to a grid point q is
    s (s A - 2 B) and a constant: of two grid points, the one that is nearer at both ends of a range of scales s is
    nearer in between. So only the ends are searched, and what is between where they differ or are too close to call.

    Args:
        x, root: magnitudes and square roots of their importance, shape (8 or 4, points).
        scale: falling from candidate to candidate, shape (candidates, groups).
        codes: shape (candidates, points).

    Returns:
        shape (candidates, points); -1 where no distance is finite.
    """
    index: Indices = grid.index.take(codes)
    off = index < 0
    changes = codes[1:] != codes[:-1]
    first, last = off.copy(), off.copy()
    first[1:] &= changes
    last[:-1] &= changes
    ends = first | last
    left, right = np.full(codes.shape, -2, np.int16), np.full(codes.shape, -3, np.int16)

    def look(where: Mask) -> None:
        at = np.flatnonzero(where)
        if len(at):
            candidate, point = np.divmod(at, x.shape[1])
            scales = scale[candidate, point % scale.shape[1]]
            found = nearest_points(grid, x, root, point, scales, codes.reshape(-1)[at].astype(np.intp))
            index.reshape(-1)[at] = found.best
            for known in (left, right):
                known.reshape(-1)[at[found.clear]] = found.best[found.clear]

    look(ends)
    inner = off & ~ends
    for c in range(1, len(codes) - 1):
        left[c] = np.where(inner[c], left[c - 1], left[c])
    for c in range(len(codes) - 2, 0, -1):
        right[c] = np.where(inner[c], right[c + 1], right[c])
    same = inner & (left == right)
    index[same] = left[same]
    look(inner & ~same)
    return index


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
        inverse = candidates[:, None] / top
        found, hit = self._points(x, self.root, self.reach, inverse, f32(1) / inverse)
        self.broken: Mask = np.logical_or.reduce(found < 0, axis=(0, 1))
        self.index: Indices = np.zeros(found.shape[1:], np.int16)
        on_grid = np.full(found.shape[1:], again != "off groups")
        best = np.zeros(x.shape[1], np.float32)
        for index, on in zip(found, hit, strict=True):
            sum_qx, sum_q2 = self._sums(self.wx, w, index)
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

    def _sums(self, wx: Floats, w: Floats, index: Indices) -> tuple[Floats, Floats]:
        """Sums of w * x * q and of w * q^2 for grid points q of each group."""
        q, t = np.empty_like(w), np.empty_like(w)
        size = len(self.grid.place)
        for k, row in enumerate(index):
            self.grid.lattice.take(row, axis=1, out=q[k * size : (k + 1) * size], mode="clip")
        sum_qx = add_up(np.multiply(wx, q, out=t))
        np.multiply(w, q, out=t)
        return sum_qx, add_up(np.multiply(t, q, out=t))

    def _points(self, x: Floats, root: Floats, reach: Floats, inverse: Floats, scale: Floats) -> tuple[Indices, Mask]:
        """Grid points for several scales, shape (scales, points, groups), and which of them were hit at once.

        Args:
            x, root: shape (group size, groups).
            reach: the largest magnitude of each group, shape (groups,).
            inverse, scale: shape (scales, groups).
        """
        grid, n = self.grid, x.shape[1]
        size, q = len(grid.place), np.empty_like(x)
        digits = q.reshape(-1, size, n)
        codes = np.empty((len(inverse), x.size // size), np.int16)
        for k, i in enumerate(inverse):
            np.multiply(x, i, out=q)
            q -= f32(1)
            q *= f32(0.5)
            round_into(q, 0, grid.top, finite=bool((reach * i < SAFE).all()))
            code = digits[:, -1].copy()
            for place in range(size - 2, -1, -1):
                code *= f32(grid.top + 1)
                code += digits[:, place]
            codes[k] = code.reshape(-1)
        index = all_nearest(grid, as_points(x, size), as_points(root, size), scale, codes)
        shape = len(inverse), -1, n
        return index.reshape(shape), grid.index.take(codes).reshape(shape) >= 0

    def _round_again(self, done: Mask) -> None:
        """Round the points that are not `done` with the scale found, then fit the scale of their groups to them."""
        groups = np.flatnonzero(~done.all(axis=0) & (self.scale > 0))
        if not len(groups):
            return
        x, w, wx, root = (array.take(groups, axis=1) for array in (self.x, self.w, self.wx, self.root))
        scale = self.scale[groups]
        found = self._points(x, root, self.reach[groups], f32(1) / scale[None], scale[None])[0][0]
        index = np.where(done[:, groups], self.index[:, groups], found)
        sum_qx, sum_q2 = self._sums(wx, w, np.maximum(index, 0))
        self.index[:, groups] = np.maximum(index, 0)
        self.scale[groups] = np.where(sum_q2 > 0, sum_qx / sum_q2, scale)
        self.broken[groups] |= (index < 0).any(axis=0)
