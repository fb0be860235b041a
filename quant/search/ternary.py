"""Scale, shift and grid points of each group: the search of the IQ1 types."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, f32
from gguforge.quant.search.grids import grid
from gguforge.quant.search.nearest import BORDER, Indices, Ints, Points, as_points, nearest_points
from gguforge.quant.search.splits import DELTA, best_rounding


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
        rounding = best_rounding(x, w, halves)
        self.scale, self.found = rounding.scale, rounding.found
        self.down: Mask = rounding.down.repeat(len(x) // 8 // halves, axis=0)
        self._to_grid(x, w, rounding.level)

    def _to_grid(self, x: Floats, w: Floats, level: NDArray[np.uint8]) -> None:
        """Move points that are not on the grid to the nearest that are, and fit the scale of their groups again."""
        points, n = grid("IQ1_S"), x.shape[1]
        digits = level.reshape(-1, 8, n).astype(np.int16)
        codes = (digits * points.place[:, None].astype(np.int16)).sum(axis=1, dtype=np.int16)
        self.index: Indices = points.index[codes]
        row, group = np.nonzero((self.index < 0) & self.found)
        if not len(row):
            return
        shift = np.where(self.down[row, group], -DELTA, DELTA)
        at = row * n + group
        values, weights = (as_points(array, 8).take(at, axis=1) for array in (x, w))
        off = Points(values, weights, self.scale[group], codes.take(at), shift)
        place = off.x / off.scale + (f32(1) - shift)
        place.clip(f32(0), f32(2), out=place)
        place -= as_points(level.astype(np.float32), 8).take(at, axis=1)
        tight = np.abs(place).max(axis=0) < f32(0.5) - BORDER
        near = np.empty(len(at), np.int16)
        for lists, which in ((points.shortlists, np.flatnonzero(tight)), (points.lists, np.flatnonzero(~tight))):
            near[which] = nearest_points(points, off.take(which), lists)
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
