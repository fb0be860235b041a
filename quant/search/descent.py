"""Scale of each group, levels on both sides of zero, by coordinate descent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, Mask, add_up, extreme, f32, nearest_int, round_into


class DescentFit:
    """Scale of each group by coordinate descent: x ~ scale * level, levels -nmax..nmax-1. Equals `make_q3_quants`.

    Up to five sweeps go over the weights in order; each weight moves to the level that is best with the others held
    still, if the group as a whole gains.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.

    Attributes:
        scale: shape (groups,).
        level: kept levels, shape (group size, groups), float32.
    """

    SWEEPS = 5

    def __init__(self, x: Floats, nmax: int) -> None:
        self.nmax = nmax
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        inverse = f32(-nmax) / peak
        self.level = x * inverse
        round_into(self.level, -nmax, nmax - 1, bool(np.isfinite(inverse).all()))
        w = x * x
        wx = w * x
        sum_lx = add_up(wx * self.level)
        sum_l2 = add_up(w * self.level * self.level)
        moving = np.arange(x.shape[1])
        for _ in range(self.SWEEPS):
            level, lx, l2 = self.level[:, moving], sum_lx[moving], sum_l2[moving]
            changed = self._sweep(x[:, moving], w[:, moving], wx[:, moving], level, lx, l2)
            self.level[:, moving], sum_lx[moving], sum_l2[moving] = level, lx, l2
            moving = moving[changed]  # a sweep that changed nothing would change nothing again
            if not len(moving):
                break
        self.scale: Floats = np.where((sum_l2 > 0) & ~self.zero, sum_lx / sum_l2, f32(0))

    def _sweep(self, x: Floats, w: Floats, wx: Floats, level: Floats, sum_lx: Floats, sum_l2: Floats) -> Mask:
        """One pass over the weights; updates `level`, `sum_lx`, `sum_l2` in place and tells which groups changed."""
        changed = np.zeros(x.shape[1], np.bool_)
        for i in range(len(x)):
            lx = sum_lx - wx[i] * level[i]
            l2 = sum_l2 - w[i] * level[i] * level[i]
            new = nearest_int(x[i] * l2 / lx).astype(np.float32)
            np.clip(new, f32(-self.nmax), f32(self.nmax - 1), out=new)
            candidate = (lx > 0) & (new != level[i])
            lx += wx[i] * new
            l2 += w[i] * new * new
            better = candidate & (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            np.copyto(level[i], new, where=better)
            np.copyto(sum_lx, lx, where=better)
            np.copyto(sum_l2, l2, where=better)
            changed |= better
        return changed

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The kept levels plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level = self.level[:, groups] + f32(self.nmax)
        level[:, self.zero[groups]] = 0
        return level
