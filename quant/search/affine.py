"""Scale and minimum of each group, by weighted least squares over candidate scales."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import Floats, Mask, add_up, dot, f32, round_into, scratch


def lowest(x: Floats) -> Floats:
    """The smallest element of each group, at most 0; of +0 and -0 the first, as a C loop finds it."""
    low: Floats = x.min(axis=0)
    columns = np.flatnonzero(low >= 0)
    if len(columns):
        first = (x[:, columns] == 0).argmax(axis=0)
        low[columns] = np.where(low[columns] > 0, f32(0), x[first, columns])
    return low


class AffineFit:
    """Scale and minimum of each group: x ~ scale * level - minimum, levels 0..nmax.

    Equals `make_qkx2_quants` and `make_qkx3_quants`.

    Starting from the range of the group, `steps + 1` candidate scales round the weights; for each rounding the weighted
    least-squares scale and minimum are computed and kept if the weighted error falls. The minimum is state: once it has
    changed, later candidates divide the range above the new one and round against it.

    Args:
        x: weights, shape (group size, groups).
        w: importance of each weight, same shape.
        nmax: the highest level.
        first, step, steps: candidate k divides the range into nmax + first + k * step levels.
        absolute: the error is w * |difference| instead of w * difference^2.

    Attributes:
        scale, minimum: shape (groups,), minimum >= 0.
    """

    def __init__(
        self, x: Floats, w: Floats, nmax: int, first: float, step: float, steps: int, absolute: bool = False
    ) -> None:
        self.x, self.w, self.nmax, self.absolute = x, w, nmax, absolute
        self.level, self.wl = (scratch(name, x.shape) for name in ("level", "wl"))
        self.sum_w = add_up(w)
        self.sums = scratch("sums", (6, x.shape[1]))  # of w, w, w*l*l, w*l*x, w*x, w*l: see `_solve`
        self.sums[:2], self.sums[4] = self.sum_w, dot(w, x)
        high = x.max(axis=0)
        self.none = np.zeros(len(high), np.float32)
        self.low = lowest(x)
        self.flat: Mask = high == self.low
        high[self.flat] += f32(1)  # any range will do: the result is overwritten
        self.base = self.low.copy()  # the minimum against which the kept rounding was made
        self.inverse = f32(nmax) / (high - self.low)  # and the inverse scale
        self.finite = bool(np.isfinite(self.inverse).all())
        self._round(self.inverse)
        self.best_scale = f32(1) / self.inverse
        self.error = self._error(self.best_scale, self.low)
        for k in range(steps + 1):
            reach = f32(first) + f32(step) * f32(k) + f32(nmax)
            self._try(reach / (high - self.low), over=bool(reach > nmax + 0.49))
        self.scale: Floats = np.where(self.flat, f32(0), self.best_scale)
        self.minimum: Floats = np.where(self.flat, -x[0], -self.low)

    def _round(self, inverse: Floats, over: bool = False) -> None:
        """Fill in the levels; without `over` the highest weight comes to less than half a level above `nmax`."""
        level = np.subtract(self.x, self.low, out=self.level)
        np.multiply(level, inverse, out=level)
        if over or not self.finite:
            round_into(level, 0, self.nmax, self.finite)
        else:
            np.maximum(np.rint(level, out=level), self.none, out=level)

    def _error(self, scale: Floats, low: Floats) -> Floats:
        """Weighted error of the current rounding, whose levels it uses up."""
        t = self.level
        np.multiply(t, scale, out=t)
        np.add(t, low, out=t)
        np.subtract(t, self.x, out=t)
        return dot(np.abs(t, out=t), self.w) if self.absolute else dot(t, t, self.w)

    def _try(self, inverse: Floats, over: bool) -> None:
        """One candidate for all groups; kept where it wins, by index: masked copies cost more than the arithmetic."""
        self._round(inverse, over)
        determinant, scale, low = self._solve()
        error = self._error(scale, low)
        won = (error < self.error).nonzero()[0]
        won = won[determinant.take(won) > 0]
        self.error[won] = error.take(won)
        self.best_scale[won] = scale.take(won)
        self.base[won] = self.low.take(won)
        self.inverse[won] = inverse.take(won)
        self.low[won] = low.take(won)

    def _solve(self) -> tuple[Floats, Floats, Floats]:
        """Determinant of the least-squares problem of the current rounding, its scale and minimum.

        The six sums stand in such an order that three differences of products, whose columns are determinant, scale
        and minimum, are found at once: w*l2 - l*l, w*xl - l*x and l2*x - l*xl.
        """
        sums, wl = self.sums, np.multiply(self.w, self.level, out=self.wl)
        dot(wl, self.level, out=sums[2])
        dot(wl, self.x, out=sums[3])
        add_up(wl, out=sums[5])
        shape = 3, sums.shape[1]
        found = np.multiply(sums[0:3], sums[2:5], out=scratch("found", shape))
        found -= np.multiply(sums[5], sums[5:2:-1], out=scratch("crossed", shape))
        found[1:] /= found[0]
        determinant, scale, low = found
        above = low > 0
        if above.any():
            low[above] = 0
            scale[above] = (sums[3] / sums[2])[above]
        return determinant, scale, low

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The levels of the kept rounding for some groups, shape (group size, len(groups))."""
        level = self.x.take(groups, axis=1)  # x[:, groups] would come out transposed
        level -= self.base[groups]
        level *= self.inverse[groups]
        round_into(level, 0, self.nmax, self.finite)
        level[:, self.flat[groups]] = 0
        return level
