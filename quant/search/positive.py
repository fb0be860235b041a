"""Scale of each group of values that are not negative: how the scales of the groups of a super-block are quantized."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import (
    GROUP_MAX_EPS,
    LIMIT,
    Floats,
    Mask,
    add_up,
    dot,
    f32,
    nearest_int,
    round_into,
    scratch,
)
from gguforge.quant.search.descent import Asked, Descent


def as_byte(level: NDArray[np.int32]) -> Floats:
    """Levels as the C code reads them back from its array of unsigned bytes: -1 is 255."""
    return (level & 255).astype(np.float32)


class PositiveFit(Descent):
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
        self.sum_lx, self.sum_l2 = dot(w * x, level), dot(w, level, level)
        self.level: Floats = as_byte(codes)
        self._descend(np.arange(x.shape[1]), np.concatenate([x, w, self.level]), np.zeros(x.shape[1], np.uint8))
        self.scale: Floats = np.where((self.sum_l2 > 0) & ~zero, self.sum_lx / self.sum_l2, f32(0))
        self.level[:, zero] = 0

    @staticmethod
    def _error(x: Floats, w: Floats, scale: Floats, level: Floats) -> Floats:
        t = scale * level
        np.subtract(x, t, out=t)
        return add_up(w * t * t)

    def _asked(self, state: Floats, sum_lx: Floats, sum_l2: Floats) -> Asked:
        x, w, level = state.reshape(3, len(state) // 3, state.shape[1])
        wx, lx, l2, wanted, t = (scratch("positive " + name, x.shape) for name in ("wx", "lx", "l2", "wanted", "t"))
        np.subtract(sum_lx, np.multiply(np.multiply(w, x, out=wx), level, out=lx), out=lx)
        np.subtract(sum_l2, np.multiply(np.multiply(w, level, out=l2), level, out=l2), out=l2)
        better = lx > 0
        better &= l2 > 0
        np.divide(np.multiply(x, l2, out=wanted), lx, out=wanted)
        round_into(wanted, -LIMIT, self.nmax, False)
        better &= wanted != level
        lx += np.multiply(wx, wanted, out=wx)
        l2 += np.multiply(np.multiply(w, wanted, out=t), wanted, out=t)
        np.multiply(np.square(lx, out=t), sum_l2, out=t)
        better &= t > np.multiply(sum_lx * sum_lx, l2, out=wx)
        return Asked(as_byte(wanted.astype(np.int32)), lx, l2, better)
