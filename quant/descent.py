"""Descent on the error of a matrix's outputs: every number of its super-blocks moves to its best place, by turns.

The error is tr(D^T H D), with D = weights - quantized weights, columns first, and H the second moments of the inputs.
It never rises but by rounding. For each block's columns (256; 32 of legacy types), and for all rows at once: the scale
and minimum of one group after another, then `d` and `dmin`, then one level after another. The gradient H D is kept up
to date within those columns, and for the others once they are done, in one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gguforge.quant.blocks.base import Floats
from gguforge.quant.blocks.fields import FIXED, Fields
from gguforge.quant.search.base import f32
from gguforge.quant.search.refine import fp16, solve_pair

SWEEPS = 12
ENOUGH = 0.002  # a sweep that gains less, relative to the error, is the last
PART = 32  # levels moved one by one before the gradient of the others follows


def descend(x: Floats, moments: Floats, fields: Sequence[Fields]) -> None:
    """Improve the encoding of a matrix in place.

    Args:
        x: the weights, shape (columns, rows).
        moments: H, shape (columns, columns), positive definite.
        fields: one for each block of a row.
    """
    before = np.inf
    for _ in range(SWEEPS):
        gap = x - np.concatenate([field.values() for field in fields])
        gradient = moments @ gap
        error = float(np.einsum("ij,ij->", gap, gradient, dtype=np.float64))
        if error >= before * (1 - ENOUGH):
            break
        before = error
        for number, field in enumerate(fields):
            here = slice(number * field.range.width, (number + 1) * field.range.width)
            old = field.values()
            _Corner(moments[here, here], gradient[here].copy(), field).sweep()
            gradient -= moments[:, here] @ (field.values() - old)


class _Corner:
    """One block a row: what it holds, and the gradient at its columns."""

    def __init__(self, moments: Floats, gradient: Floats, fields: Fields) -> None:
        self.moments, self.gradient, self.fields = np.ascontiguousarray(moments), gradient, fields

    def sweep(self) -> None:
        """Move everything once."""
        if self.fields.range.scale != FIXED:
            for group in range(self.fields.range.groups):
                self._move_group(group)
        self._move_steps()
        self._move_levels()

    def _changed(self, change: Floats, columns: slice) -> None:
        """The gradient after the values of some columns have changed."""
        self.gradient -= self.moments[:, columns] @ change

    def _move_group(self, group: int) -> None:
        """Scale and minimum: the whole numbers around the best scale, each with the best minimum for it."""
        f, range = self.fields, self.fields.range
        columns = slice(group * range.size, (group + 1) * range.size)
        level, corner, slope = f.level[columns], self.moments[columns, columns], self.gradient[columns]
        along = corner @ level
        aa, ax = (level * along).sum(axis=0), (level * slope).sum(axis=0)
        ab, bx, bb = -along.sum(axis=0), -slope.sum(axis=0), np.full_like(aa, corner.sum())
        scale, minimum = f.scale[group], f.minimum[group]
        p = np.divide(ax, aa, out=np.zeros_like(aa), where=aa > 0)
        if range.minimum:
            clear, both, _ = solve_pair(aa, ab, bb, ax, bx)
            p = np.where(clear, both, p).astype(np.float32)
        ideal = scale + np.divide(p, f.d, out=np.zeros_like(p), where=f.d != 0)
        gain, best_scale, best_minimum = np.zeros_like(aa), scale.copy(), minimum.copy()
        for candidate in (np.floor(ideal), np.ceil(ideal), scale):
            s = np.clip(candidate, *range.scale)
            ds = (s - scale) * f.d
            m, dm = minimum, np.zeros_like(ds)
            if range.minimum:
                dm = (bx - ds * ab) / bb
                m = np.rint(minimum + np.divide(dm, f.dmin, out=np.zeros_like(dm), where=f.dmin != 0))
                m = np.clip(m, 0, range.minimum)
                dm = (m - minimum) * f.dmin
            this = 2 * (ds * ax + dm * bx) - (ds * ds * aa + 2 * ds * dm * ab + dm * dm * bb)
            won = this > gain
            gain = np.where(won, this, gain)
            best_scale, best_minimum = np.where(won, s, best_scale), np.where(won, m, best_minimum)
        change = (best_scale - scale) * f.d * level - (best_minimum - minimum) * f.dmin
        f.scale[group], f.minimum[group] = best_scale, best_minimum
        self._changed(change, columns)

    def _move_steps(self) -> None:
        """`d` and `dmin`, rounded to fp16."""
        f, size = self.fields, self.fields.range.size
        a = np.repeat(f.scale, size, axis=0) * f.level
        along = self.moments @ a
        aa, ax = (a * along).sum(axis=0), (a * self.gradient).sum(axis=0)
        p = np.divide(ax, aa, out=np.zeros_like(aa), where=aa > 0)
        b, q = np.zeros_like(a), np.zeros_like(p)
        ab = bb = bx = np.zeros_like(aa)
        if f.range.minimum:
            b = -np.repeat(f.minimum, size, axis=0)
            ab, bb, bx = (b * along).sum(axis=0), (b * (self.moments @ b)).sum(axis=0), (b * self.gradient).sum(axis=0)
            clear, both, other = solve_pair(aa, ab, bb, ax, bx)
            p, q = np.where(clear, both, p).astype(np.float32), np.where(clear, other, 0).astype(np.float32)
        d, dmin = fp16(f.d + p), fp16(f.dmin + q if f.range.scale == FIXED else np.maximum(f.dmin + q, 0))
        p, q = d - f.d, dmin - f.dmin
        gain = 2 * (p * ax + q * bx) - (p * p * aa + 2 * p * q * ab + q * q * bb)
        won = np.isfinite(d) & np.isfinite(dmin) & (gain > 0)
        f.d, f.dmin = np.where(won, d, f.d), np.where(won, dmin, f.dmin)
        self._changed(np.where(won, p, 0) * a + np.where(won, q, 0) * b, slice(None))

    def _move_levels(self) -> None:
        """Each level to the one nearest to where the error would be least."""
        f, range = self.fields, self.fields.range
        step = f.step
        inverse = np.divide(f32(1), step, out=np.zeros_like(step), where=step != 0)
        for first in np.arange(0, range.width, PART):
            part = slice(first, first + PART)
            corner, slope = self.moments[part, part], self.gradient[part].copy()
            change = np.empty_like(slope)
            for i in np.arange(PART):
                group, level = (first + i) // range.size, f.level[first + i]
                new = np.rint(level + slope[i] * inverse[group] / corner[i, i])
                np.clip(new, *range.level, out=new)
                change[i] = step[group] * (new - level)
                f.level[first + i] = new
                slope -= corner[:, i, None] * change[i]
            self._changed(change, part)
