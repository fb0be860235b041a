"""Scale of each group, levels on both sides of zero, by candidates."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, Mask, dot, extreme, f32, round_into, scratch

STEPS = (0, *range(-9, 0), *range(1, 10))  # the order in which candidates are tried
NEVER_ABOVE = -6  # up to this step no weight is rounded to a level beyond nmax - 1
NEVER_BELOW = 4  # and up to this one none to a level beyond -nmax
COLUMNS = 1 << 11  # groups whose sums are made at once: with all that is made of them they stay in the second cache
BATCHES = (0, 1, 5, 10, 14, 19)  # places of the candidates rounded at once, all alike in what was just said


class SymmetricFit:
    """Scale of each group: x ~ scale * level, levels -nmax..nmax-1. Equals `make_qx_quants` with rmse_type 1.

    Candidate `step` puts the extreme weight at -(nmax + step / 10); for each rounding the weighted least-squares scale
    is kept if it explains more of the group than the best so far.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.
        w: importance of each weight, same shape; x^2 if None.
        purpose: prefix of its working memory, for a fit within a fit.

    Attributes:
        scale: shape (groups,); its sign is that of -extreme.
    """

    def __init__(self, x: Floats, nmax: int, w: Floats | None = None, purpose: str = "") -> None:
        self.x, self.w, self.nmax, self.purpose = x, w, nmax, purpose
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        reach = -(f32(nmax) + f32(0.1) * np.array(STEPS, np.float32))
        shape = len(reach), len(peak)  # (candidates, groups)
        self.inverse = np.divide(reach[:, None], peak, out=scratch(purpose + "inverse", shape))
        self.finite = bool(np.isfinite(self.inverse[0]).all())
        self.sum_lx, self.sum_l2 = scratch(purpose + "sum_lx", shape), scratch(purpose + "sum_l2", shape)
        for start in range(0, len(peak), COLUMNS):
            self._sums(slice(start, start + COLUMNS))
        self.chosen = self._choose()
        kept = self.chosen * len(peak) + np.arange(len(peak))
        self.scale: Floats = self.sum_lx.reshape(-1).take(kept)
        sum_l2 = self.sum_l2.reshape(-1).take(kept)
        self.scale /= sum_l2
        self.scale[self.zero | (sum_l2 == 0)] = 0

    def _sums(self, groups: slice) -> None:
        """Fill in the sums of w * x * level and of w * level^2 of some groups for all candidates."""
        x = self.x[:, groups]
        w = np.square(x, out=scratch(self.purpose + "w", x.shape)) if self.w is None else self.w[:, groups]
        wx = np.multiply(w, x, out=scratch(self.purpose + "wx", x.shape))
        highest = np.full(x.shape[1], self.nmax - 1, np.float32)  # a scalar is slow
        for first, last in pairwise(BATCHES):
            level = scratch(self.purpose + "level", (last - first, *x.shape))
            np.multiply(x, self.inverse[first:last, None, groups], out=level)
            if not self.finite or STEPS[last - 1] > NEVER_BELOW:
                round_into(level, -self.nmax, self.nmax - 1, self.finite)
            else:
                np.rint(level, out=level)
                if STEPS[last - 1] > NEVER_ABOVE:
                    np.minimum(level, highest, out=level)
            dot(wx, level, out=self.sum_lx[first:last, groups])
            dot(w, level, level, out=self.sum_l2[first:last, groups])

    def _choose(self) -> NDArray[np.intp]:
        """The last candidate of each group that explained more than all before it; shape (groups,)."""
        shape = self.sum_lx.shape
        gain = np.divide(self.sum_lx, self.sum_l2, out=scratch(self.purpose + "gain", shape))
        gain *= self.sum_lx
        square = np.square(self.sum_lx, out=scratch(self.purpose + "square", shape))
        best = np.where(self.sum_l2[0] == 0, f32(0), gain[0])
        chosen, bar = np.zeros(len(best), np.intp), np.empty_like(best)
        for k in range(1, len(gain)):
            np.multiply(best, self.sum_l2[k], out=bar)
            won = (square[k] > bar).nonzero()[0]  # by index: masked copies cost more than the arithmetic
            best[won] = gain[k].take(won)
            chosen[won] = k
        return chosen

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The kept levels plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level = self.x.take(groups, axis=1)  # x[:, groups] would come out transposed
        level *= self.inverse[self.chosen[groups], groups]
        round_into(level, -self.nmax, self.nmax - 1, self.finite)
        level += f32(self.nmax)
        level[:, self.zero[groups]] = 0
        return level
