"""Scale of each group of values that are not negative: how the scales of the groups of a super-block are quantized."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, Mask, add_up, f32, nearest_int


def as_byte(level: NDArray[np.int32]) -> Floats:
    """Levels as the C code reads them back from its array of unsigned bytes: -1 is 255."""
    return (level & 255).astype(np.float32)


class PositiveFit:
    """Scale of each group: x ~ scale * level, levels 0..nmax. Equals `make_qp_quants`.

    The scale that puts the largest value at nmax, and eight near it, round the values; from the one of least weighted
    error up to five sweeps of coordinate descent follow. A value may be negative (a weight whose sign could not be
    kept): its level then wraps around as in C.

    Args:
        x: values, shape (group size, groups).
        w: importance of each value, same shape.
        nmax: the highest level.

    Attributes:
        scale: shape (groups,).
        level: shape (group size, groups), float32, 0..255.
    """

    SWEEPS = 5

    def __init__(self, x: Floats, w: Floats, nmax: int) -> None:
        self.nmax = nmax
        top = np.maximum(x.max(axis=0), f32(0))
        zero: Mask = top < GROUP_MAX_EPS
        top[zero] = 1
        inverse = f32(nmax) / top
        error = self._error(x, w, f32(1) / inverse, as_byte(nearest_int(inverse * x)))
        for step in (*range(-4, 0), *range(1, 5)):
            candidate = (f32(0.1) * f32(step) + f32(nmax)) / top
            level = np.minimum(nearest_int(candidate * x), nmax).astype(np.float32)
            this = self._error(x, w, f32(1) / candidate, level)
            won = np.flatnonzero(this < error)
            error[won], inverse[won] = this[won], candidate[won]
        codes = np.minimum(nearest_int(inverse * x), nmax)
        level = codes.astype(np.float32)
        wx = w * x
        sum_lx = add_up(wx * level)
        sum_l2 = add_up(w * level * level)
        self.level: Floats = as_byte(codes)
        self._descend(x, w, wx, sum_lx, sum_l2)
        self.scale: Floats = np.where((sum_l2 > 0) & ~zero, sum_lx / sum_l2, f32(0))
        self.level[:, zero] = 0

    @staticmethod
    def _error(x: Floats, w: Floats, scale: Floats, level: Floats) -> Floats:
        t = x - scale * level
        return add_up(w * t * t)

    def _descend(self, x: Floats, w: Floats, wx: Floats, sum_lx: Floats, sum_l2: Floats) -> None:
        """Sweeps over the values of all groups that still move; updates `level` and both sums in place."""
        moving = np.arange(x.shape[1])
        for _ in range(self.SWEEPS):
            state = self.level[:, moving], sum_lx[moving], sum_l2[moving]
            changed = self._sweep(x[:, moving], w[:, moving], wx[:, moving], *state)
            self.level[:, moving], sum_lx[moving], sum_l2[moving] = state
            moving = moving[changed]
            if not len(moving):
                break

    def _sweep(self, x: Floats, w: Floats, wx: Floats, level: Floats, sum_lx: Floats, sum_l2: Floats) -> Mask:
        """One pass over the values; updates the last three in place and tells which groups changed."""
        changed = np.zeros(x.shape[1], np.bool_)
        for i in range(len(x)):
            lx = sum_lx - wx[i] * level[i]
            l2 = sum_l2 - w[i] * level[i] * level[i]
            code = np.minimum(nearest_int(x[i] * l2 / lx), self.nmax)
            new = code.astype(np.float32)
            candidate = (lx > 0) & (l2 > 0) & (new != level[i])
            lx += wx[i] * new
            l2 += w[i] * new * new
            better = np.flatnonzero(candidate & (lx * lx * sum_l2 > sum_lx * sum_lx * l2))
            if len(better):
                level[i, better] = as_byte(code[better])
                sum_lx[better], sum_l2[better] = lx[better], l2[better]
                changed[better] = True
        return changed
