"""Scale searches: for each group of 16 or 32 weights, the scale (and minimum) that rounds it best.

Groups are columns: **element index on axis 0, groups on axis 1**. A sum along axis 0 then adds in the order in which
ggml's C loops add, so every result has the same bits, and SIMD runs across groups. Only separate multiplications and
additions are used (no dot, no einsum): nothing can be fused on any machine, so all machines agree. Every function names
the C function that it equals (ggml/src/ggml-quants.c); what it does not do: pack the results into blocks.
"""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

GROUP_MAX_EPS = np.float32(1e-15)  # ggml: a group whose largest weight is below this is all zero
CACHE_LINE = 64  # bytes
MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds a float to the nearest integer, ties to even


def f32(value: float) -> np.float32:
    """A Python number as the C code's float constant."""
    return np.float32(value)


def nearest_int(x: Floats) -> NDArray[np.int32]:
    """Round half to even as ggml's `nearest_int`, which wraps beyond 2^22 and sends infinity to -2^22, NaN to 0."""
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


class _Scratch(threading.local):
    """This thread's working memory, by purpose."""

    def __init__(self) -> None:
        self.arrays: dict[str, Floats] = {}


_scratch = _Scratch()


def scratch(purpose: str, shape: tuple[int, ...]) -> Floats:
    """Uninitialised float32 working memory, the same each time for one purpose and shape, aligned to a cache line.

    Fresh arrays of this size would be mapped and unmapped by the allocator for every tile, and their page faults cost
    more than the arithmetic; alignment makes work in place up to 1.4 times faster. Two arrays that are in use at the
    same time need two purposes.
    """
    found = _scratch.arrays.get(purpose)
    if found is None or found.shape != shape:
        nbytes = 4 * math.prod(shape)
        raw = np.empty(nbytes + CACHE_LINE, np.uint8)
        start = -raw.ctypes.data % CACHE_LINE
        found = _scratch.arrays[purpose] = raw[start : start + nbytes].view(np.float32).reshape(shape)
    return found


def add_up(terms: Floats) -> Floats:
    """Sum along axis 0, first element first, as a C loop adds: (group size, groups) -> (groups,)."""
    total: Floats = np.add.reduce(terms, axis=0)
    return total


def round_into(t: Floats, low: int, high: int, finite: bool) -> None:
    """Round `t` in place, then clip to `low..high`; `finite` promises that |t| < 2^22 everywhere."""
    if finite:
        np.rint(t, out=t)
    else:
        t[...] = nearest_int(t)
    t.clip(f32(low), f32(high), out=t)  # one pass; np.maximum with a scalar is three times slower


def extreme(x: Floats) -> Floats:
    """The element of largest magnitude of each group, the first of equals; shape (groups,)."""
    top, bottom = x.max(axis=0), x.min(axis=0)
    tie = top == -bottom
    peak: Floats = np.where(top > -bottom, top, bottom)
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
        self.level, self.wl, self.t = (scratch(name, x.shape) for name in ("level", "wl", "t"))
        self.sum_w = add_up(w)
        self.sum_x = add_up(np.multiply(w, x, out=self.t))
        high = x.max(axis=0)
        self.low = np.minimum(x.min(axis=0), f32(0))
        self.flat: Mask = high == self.low
        high[self.flat] += f32(1)  # any range will do: the result is overwritten
        self.base = self.low.copy()  # the minimum against which the kept rounding was made
        self.inverse = f32(nmax) / (high - self.low)  # and the inverse scale
        self.finite = bool(np.isfinite(self.inverse).all())
        self._round(self.inverse)
        self.best_scale = f32(1) / self.inverse
        self.error = self._error(self.best_scale, self.low)
        for k in range(steps + 1):
            self._try((f32(first) + f32(step) * f32(k) + f32(nmax)) / (high - self.low))
        self.scale: Floats = np.where(self.flat, f32(0), self.best_scale)
        self.minimum: Floats = np.where(self.flat, -np.minimum(x[0], f32(0)), -self.low)

    def _round(self, inverse: Floats) -> None:
        np.subtract(self.x, self.low, out=self.level)
        np.multiply(self.level, inverse, out=self.level)
        round_into(self.level, 0, self.nmax, self.finite)

    def _error(self, scale: Floats, low: Floats) -> Floats:
        """Weighted error of the current rounding, whose levels it uses up."""
        t = self.level
        np.multiply(t, scale, out=t)
        np.add(t, low, out=t)
        np.subtract(t, self.x, out=t)
        (np.abs if self.absolute else np.square)(t, out=t)
        return add_up(np.multiply(t, self.w, out=t))

    def _try(self, inverse: Floats) -> None:
        """One candidate for all groups; kept where it wins, by index: masked copies cost more than the arithmetic."""
        self._round(inverse)
        sum_l = add_up(np.multiply(self.w, self.level, out=self.wl))
        sum_l2 = add_up(np.multiply(self.wl, self.level, out=self.t))
        sum_xl = add_up(np.multiply(self.wl, self.x, out=self.wl))
        determinant = self.sum_w * sum_l2 - sum_l * sum_l
        scale = np.divide(self.sum_w * sum_xl - self.sum_x * sum_l, determinant, dtype=np.float32)
        low = np.divide(sum_l2 * self.sum_x - sum_l * sum_xl, determinant, dtype=np.float32)
        above = np.flatnonzero(low > 0)
        low[above] = 0
        scale[above] = sum_xl[above] / sum_l2[above]
        error = self._error(scale, low)
        won = np.flatnonzero(error < self.error)
        won = won[determinant[won] > 0]
        self.error[won] = error[won]
        self.best_scale[won] = scale[won]
        self.base[won] = self.low[won]
        self.inverse[won] = inverse[won]
        self.low[won] = low[won]

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The levels of the kept rounding for some groups, shape (group size, len(groups))."""
        level: Floats = (self.x[:, groups] - self.base[groups]) * self.inverse[groups]
        round_into(level, 0, self.nmax, self.finite)
        level[:, self.flat[groups]] = 0
        return level


class SymmetricFit:
    """Scale of each group: x ~ scale * level, levels -nmax..nmax-1, error weighted by x^2.

    Equals `make_qx_quants` with rmse_type 1. Candidates put the extreme weight at -nmax, then at -nmax +- 0.9 in steps
    of 0.1; for each rounding the weighted least-squares scale is kept if it explains more of the group than the best
    so far.

    Args:
        x: weights, shape (group size, groups).
        nmax: half the number of levels.

    Attributes:
        scale: shape (groups,); its sign is that of -extreme.
    """

    STEPS = (0, *range(-9, 0), *range(1, 10))

    def __init__(self, x: Floats, nmax: int) -> None:
        self.x, self.nmax = x, nmax
        peak = extreme(x)
        self.zero: Mask = np.abs(peak) < GROUP_MAX_EPS
        peak[self.zero] = 1
        reach = [-(f32(nmax) + f32(0.1) * f32(step)) for step in self.STEPS]
        shape = len(reach), len(peak)  # (candidates, groups)
        self.inverse = np.divide(np.array(reach, np.float32)[:, None], peak, out=scratch("inverse", shape))
        self.finite = bool(np.isfinite(self.inverse[0]).all())
        sum_lx, sum_l2 = scratch("sum_lx", shape), scratch("sum_l2", shape)
        self._sums(sum_lx, sum_l2)
        scale = np.divide(sum_lx, sum_l2, out=scratch("scale", shape))
        gain = np.multiply(scale, sum_lx, out=scratch("gain", shape))
        best = np.where(sum_l2[0] != 0, gain[0], f32(0))
        self.chosen = np.zeros(len(peak), np.intp)
        np.square(sum_lx, out=sum_lx)
        for k in range(1, len(self.STEPS)):
            won = np.flatnonzero(sum_lx[k] > best * sum_l2[k])
            best[won] = gain[k][won]
            self.chosen[won] = k
        every = np.arange(len(peak))
        self.scale: Floats = np.where(self.zero | (sum_l2[self.chosen, every] == 0), f32(0), scale[self.chosen, every])

    def _sums(self, sum_lx: Floats, sum_l2: Floats) -> None:
        """Fill in the sums of w * x * level and of w * level^2 for every candidate; shape (candidates, groups)."""
        x, level, t = self.x, scratch("level", self.x.shape), scratch("t", self.x.shape)
        w = np.square(x, out=scratch("w", x.shape))
        wx = np.multiply(w, x, out=scratch("wx", x.shape))
        for k, inverse in enumerate(self.inverse):
            np.multiply(x, inverse, out=level)
            round_into(level, -self.nmax, self.nmax - 1, self.finite)
            np.add.reduce(np.multiply(wx, level, out=t), axis=0, out=sum_lx[k])
            np.multiply(w, level, out=t)
            np.add.reduce(np.multiply(t, level, out=t), axis=0, out=sum_l2[k])

    def levels(self, groups: NDArray[np.intp]) -> Floats:
        """The kept levels plus nmax for some groups, shape (group size, len(groups)); 0 for a zero group."""
        level = self.x[:, groups] * self.inverse[self.chosen[groups], groups]
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
