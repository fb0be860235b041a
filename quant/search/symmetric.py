"""Scale of each group, levels on both sides of zero, by candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, Mask, add_up, extreme, f32, round_into, scratch


class SymmetricFit:
    """Scale of each group: x ~ scale * level, levels -nmax..nmax-1. Equals `make_qx_quants` with rmse_type 1.

    Candidates put the extreme weight at -nmax, then at -nmax +- 0.9 in steps
    of 0.1; for each rounding the weighted least-squares scale is kept if it explains more of the group than the best
    so far.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.
        w: importance of each weight, same shape; x^2 if None.
        purpose: prefix of its working memory, for a fit within a fit.

    Attributes:
        scale: shape (groups,); its sign is that of -extreme.
    """

    STEPS = (0, *range(-9, 0), *range(1, 10))

    def __init__(self, x: Floats, nmax: int, w: Floats | None = None, purpose: str = "") -> None:
        self.x, self.nmax, self.purpose = x, nmax, purpose
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        reach = [-(f32(nmax) + f32(0.1) * f32(step)) for step in self.STEPS]
        shape = len(reach), len(peak)  # (candidates, groups)
        self.inverse = np.divide(np.array(reach, np.float32)[:, None], peak, out=scratch(purpose + "inverse", shape))
        self.finite = bool(np.isfinite(self.inverse[0]).all())
        sum_lx, sum_l2 = scratch(purpose + "sum_lx", shape), scratch(purpose + "sum_l2", shape)
        self._sums(sum_lx, sum_l2, np.square(x, out=scratch(purpose + "w", x.shape)) if w is None else w)
        scale = np.divide(sum_lx, sum_l2, out=scratch(purpose + "scale", shape))
        gain = np.multiply(scale, sum_lx, out=scratch(purpose + "gain", shape))
        best = np.where(sum_l2[0] != 0, gain[0], f32(0))
        self.chosen = np.zeros(len(peak), np.uint8)
        np.square(sum_lx, out=sum_lx)
        for k in range(1, len(self.STEPS)):
            won = np.flatnonzero(sum_lx[k] > best * sum_l2[k])
            best[won] = gain[k][won]
            self.chosen[won] = k
        every = np.arange(len(peak))
        self.scale: Floats = np.where(self.zero | (sum_l2[self.chosen, every] == 0), f32(0), scale[self.chosen, every])

    def _sums(self, sum_lx: Floats, sum_l2: Floats, w: Floats) -> None:
        """Fill in the sums of w * x * level and of w * level^2 for every candidate; shape (candidates, groups)."""
        x, level, t = self.x, scratch(self.purpose + "level", self.x.shape), scratch(self.purpose + "t", self.x.shape)
        wx = np.multiply(w, x, out=scratch(self.purpose + "wx", x.shape))
        for k, inverse in enumerate(self.inverse):
            np.multiply(x, inverse, out=level)
            round_into(level, -self.nmax, self.nmax - 1, self.finite)
            add_up(np.multiply(wx, level, out=t), out=sum_lx[k])
            np.multiply(w, level, out=t)
            add_up(np.multiply(t, level, out=t), out=sum_l2[k])

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The kept levels plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level = self.x[:, groups] * self.inverse[self.chosen[groups], groups]
        round_into(level, -self.nmax, self.nmax - 1, self.finite)
        level += f32(self.nmax)
        level[:, self.zero[groups]] = 0
        return level
