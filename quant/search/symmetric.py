"""Scale of each group, levels on both sides of zero, by candidates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, Mask, dot, extremes, f32, round_into, scratch

STEPS = (0, *range(-9, 0), *range(1, 10))  # the order in which candidates are tried
LOWEST_ABOVE = -5  # below this step no weight is rounded to a level beyond nmax - 1
HIGHEST_INSIDE = 4  # above this step the extreme weight is rounded to a level beyond -nmax
FEW = 8  # the groups that need clipping are done again where they are fewer than one in this many


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
        self.x, self.nmax, self.purpose = x, nmax, purpose
        self.w = np.square(x, out=scratch(purpose + "w", x.shape)) if w is None else w
        peak, opposite = extremes(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        reach = -(f32(nmax) + f32(0.1) * np.array(STEPS, np.float32))
        shape = len(reach), len(peak)  # (candidates, groups)
        self.inverse = np.divide(reach[:, None], peak, out=scratch(purpose + "inverse", shape))
        self.finite = bool(np.isfinite(self.inverse[0]).all())
        self.sum_lx, self.sum_l2 = scratch(purpose + "sum_lx", shape), scratch(purpose + "sum_l2", shape)
        highest = f32((nmax - 0.5) / (nmax + 0.1 * HIGHEST_INSIDE) * 0.9999)  # of weights whose level is inside
        self._sums_of_all(np.flatnonzero(opposite > np.abs(peak) * highest))
        self.chosen = self._choose()
        kept = self.chosen * len(peak) + np.arange(len(peak))
        self.scale: Floats = self.sum_lx.reshape(-1).take(kept)
        sum_l2 = self.sum_l2.reshape(-1).take(kept)
        self.scale /= sum_l2
        self.scale[self.zero | (sum_l2 == 0)] = 0

    def _sums_of_all(self, above: NDArray[np.intp]) -> None:
        """Sums of all candidates; `above` are the groups with levels beyond nmax - 1 where nothing is clipped.

        They are few where levels are many; the other groups are spared the clipping.
        """
        every = not self.finite or len(above) * FEW > self.x.shape[1]
        clipped = [every or step > HIGHEST_INSIDE for step in STEPS]
        self._sums(self.x, self.w, self.inverse, self.sum_lx, self.sum_l2, clipped, self.purpose)
        if not every and len(above):
            again = np.flatnonzero([LOWEST_ABOVE <= step <= HIGHEST_INSIDE for step in STEPS])
            some = np.ix_(again, above)
            x, w, inverse = self.x.take(above, axis=1), self.w.take(above, axis=1), self.inverse[some]
            sum_lx, sum_l2 = np.empty_like(inverse), np.empty_like(inverse)
            self._sums(x, w, inverse, sum_lx, sum_l2, [True] * len(again), self.purpose + "above ")
            self.sum_lx[some], self.sum_l2[some] = sum_lx, sum_l2

    def _sums(
        self, x: Floats, w: Floats, inverse: Floats, sum_lx: Floats, sum_l2: Floats, clipped: list[bool], purpose: str
    ) -> None:
        """Fill in the sums of w * x * level and of w * level^2 for candidates; shape (candidates, groups)."""
        level = scratch(purpose + "level", x.shape)
        wx = np.multiply(w, x, out=scratch(purpose + "wx", x.shape))
        for k, clip in enumerate(clipped):
            np.multiply(x, inverse[k], out=level)
            if clip:
                round_into(level, -self.nmax, self.nmax - 1, self.finite)
            else:
                np.rint(level, out=level)
            dot(wx, level, out=sum_lx[k])
            dot(w, level, level, out=sum_l2[k])

    def _choose(self) -> NDArray[np.intp]:
        """The last candidate of each group that explained more than all before it; shape (groups,)."""
        gain = np.divide(self.sum_lx, self.sum_l2, out=scratch(self.purpose + "gain", self.sum_lx.shape))
        gain *= self.sum_lx
        best = np.where(self.sum_l2[0] == 0, f32(0), gain[0])
        chosen = np.zeros(len(best), np.intp)
        square, bar = scratch(self.purpose + "square", best.shape), scratch(self.purpose + "bar", best.shape)
        for k in range(1, len(gain)):
            np.square(self.sum_lx[k], out=square)
            np.multiply(best, self.sum_l2[k], out=bar)
            won = np.flatnonzero(square > bar)  # by index: masked copies cost more than the arithmetic
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
