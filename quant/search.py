"""Scale searches: for each group of 16 or 32 weights, the scale (and minimum) that rounds it best.

Groups are columns: **element index on axis 0, groups on axis 1**. A sum along axis 0 then adds in the order in which
ggml's C loops add, so every result has the same bits, and SIMD runs across groups. Only separate multiplications and
additions are used (no dot, no einsum): nothing can be fused on any machine, so all machines agree. Every function names
the C function that it equals (ggml/src/ggml-quants.c); what it does not do: pack the results into blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

GROUP_MAX_EPS = np.float32(1e-15)  # ggml: a group whose largest weight is below this is all zero
MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds a float to the nearest integer, ties to even


def f32(value: float) -> np.float32:
    """A Python number as the C code's float constant."""
    return np.float32(value)


def nearest_int(x: Floats) -> NDArray[np.int32]:
    """Round half to even as ggml's `nearest_int`, which wraps beyond 2^22 and sends infinity to -2^22, NaN to 0."""
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def round_into(t: Floats, low: int, high: int, finite: bool) -> None:
    """Round `t` in place, then clip to `low..high`; `finite` promises that |t| < 2^22 everywhere."""
    if finite:
        np.rint(t, out=t)
    else:
        t[...] = nearest_int(t)
    np.maximum(t, f32(low), out=t)
    np.minimum(t, f32(high), out=t)


def extreme(x: Floats) -> Floats:
    """The element of largest magnitude of each group, the first of equals; shape (groups,)."""
    top, bottom = x.max(axis=0), x.min(axis=0)
    tie = top == -bottom
    peak = np.where(top > -bottom, top, bottom)
    if tie.any():
        columns = np.flatnonzero(tie)
        first = np.abs(x[:, columns]).argmax(axis=0)
        peak[columns] = x[first, columns]
    return peak


class AffineFit:
    """Scale and minimum of each group: x ~ scale * level - minimum, levels 0..nmax. Equals `make_qkx2_quants`.

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
        self.sum_w = np.add.reduce(w, axis=0)
        self.l, self.t = np.empty_like(x), np.empty_like(x)
        self.sum_x = self._sum(w, x)
        low = np.minimum(x.min(axis=0), f32(0))
        self.high = x.max(axis=0)
        self.flat: Mask = self.high == low
        self.high[self.flat] += f32(1)  # any range will do: the result is overwritten
        self.low = low
        self.base = low.copy()  # the minimum against which the kept rounding was made
        self.inverse = f32(nmax) / (self.high - low)  # and the inverse scale
        self.finite = bool(np.isfinite(self.inverse).all())
        self._round(self.inverse)
        self.best_scale = f32(1) / self.inverse
        self.best_error = self._error(self.best_scale, low)
        for k in range(steps + 1):
            self._try((f32(first) + f32(step) * f32(k) + f32(nmax)) / (self.high - self.low))
        self.scale = np.where(self.flat, f32(0), self.best_scale)
        self.minimum = np.where(self.flat, -np.minimum(x[0], f32(0)), -self.low)

    def _sum(self, a: Floats, b: Floats) -> Floats:
        np.multiply(a, b, out=self.t)
        return np.add.reduce(self.t, axis=0)

    def _round(self, inverse: Floats) -> None:
        np.subtract(self.x, self.low, out=self.l)
        np.multiply(self.l, inverse, out=self.l)
        round_into(self.l, 0, self.nmax, self.finite)

    def _error(self, scale: Floats, low: Floats) -> Floats:
        t = self.t
        np.multiply(self.l, scale, out=t)
        np.add(t, low, out=t)
        np.subtract(t, self.x, out=t)
        if self.absolute:
            np.abs(t, out=t)
        else:
            np.multiply(t, t, out=t)
        np.multiply(t, self.w, out=t)
        return np.add.reduce(t, axis=0)

    def _try(self, inverse: Floats) -> None:
        self._round(inverse)
        wl = self.w * self.l
        sum_l = np.add.reduce(wl, axis=0)
        sum_l2 = self._sum(wl, self.l)
        sum_xl = self._sum(wl, self.x)
        determinant = self.sum_w * sum_l2 - sum_l * sum_l
        scale = (self.sum_w * sum_xl - self.sum_x * sum_l) / determinant
        low = (sum_l2 * self.sum_x - sum_l * sum_xl) / determinant
        above = low > 0
        if above.any():
            low[above] = 0
            scale[above] = sum_xl[above] / sum_l2[above]
        error = self._error(scale, low)
        better = (error < self.best_error) & (determinant > 0)
        np.copyto(self.best_error, error, where=better)
        np.copyto(self.best_scale, scale, where=better)
        np.copyto(self.base, self.low, where=better)
        np.copyto(self.inverse, inverse, where=better)
        np.copyto(self.low, low, where=better)

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The levels of the kept rounding for some groups, shape (group size, len(groups))."""
        level = (self.x[:, groups] - self.base[groups]) * self.inverse[groups]
        round_into(level, 0, self.nmax, self.finite)
        level[:, self.flat[groups]] = 0
        return level


class SymmetricFit:
    """Scale of each group: x ~ scale * level, levels -nmax..nmax-1, error weighted by x^2. Equals `make_qx_quants`, rmse_type 1.

    Candidates put the extreme weight at -nmax +- 0.9 in steps of 0.1; for each rounding the weighted least-squares scale
    is kept if it explains more of the group.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.

    Attributes:
        scale: shape (groups,); its sign is that of -extreme.
    """

    def __init__(self, x: Floats, nmax: int) -> None:
        self.x, self.nmax = x, nmax
        self.w = x * x
        self.wx = self.w * x
        self.l, self.t = np.empty_like(x), np.empty_like(x)
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        self.inverse = f32(-nmax) / peak
        self.finite = bool(np.isfinite(self.inverse).all())
        sum_lx, sum_l2 = self._sums(self.inverse)
        self.scale = np.where(sum_l2 != 0, sum_lx / sum_l2, f32(0))
        self.best = self.scale * sum_lx
        for k in [*range(-9, 0), *range(1, 10)]:
            self._try(-(f32(nmax) + f32(0.1) * f32(k)) / peak)
        self.scale[self.zero] = 0

    def _sums(self, inverse: Floats) -> tuple[Floats, Floats]:
        np.multiply(self.x, inverse, out=self.l)
        round_into(self.l, -self.nmax, self.nmax - 1, self.finite)
        np.multiply(self.wx, self.l, out=self.t)
        sum_lx = np.add.reduce(self.t, axis=0)
        np.multiply(self.w, self.l, out=self.t)
        np.multiply(self.t, self.l, out=self.t)
        return sum_lx, np.add.reduce(self.t, axis=0)

    def _try(self, inverse: Floats) -> None:
        sum_lx, sum_l2 = self._sums(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > self.best * sum_l2)
        scale = sum_lx / sum_l2
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.best, scale * sum_lx, where=better)
        np.copyto(self.inverse, inverse, where=better)

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The levels of the kept rounding plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level = self.x[:, groups] * self.inverse[groups]
        round_into(level, -self.nmax, self.nmax - 1, self.finite)
        level += f32(self.nmax)
        level[:, self.zero[groups]] = 0
        return level


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
        sum_lx = np.add.reduce(wx * self.level, axis=0)
        sum_l2 = np.add.reduce(w * self.level * self.level, axis=0)
        moving = np.arange(x.shape[1])
        for _ in range(self.SWEEPS):
            level, lx, l2 = self.level[:, moving], sum_lx[moving], sum_l2[moving]
            changed = self._sweep(x[:, moving], w[:, moving], wx[:, moving], level, lx, l2)
            self.level[:, moving], sum_lx[moving], sum_l2[moving] = level, lx, l2
            moving = moving[changed]  # a sweep that changed nothing would change nothing again
            if not len(moving):
                break
        self.scale = np.where((sum_l2 > 0) & ~self.zero, sum_lx / sum_l2, f32(0))

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
