"""Scale of each group whose levels are the entries of a table of sixteen values, denser near zero (the IQ4 types)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.search.base import GROUP_MAX_EPS, Floats, add_up, extreme, f32, scratch

Bytes = NDArray[np.uint8]

TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

# The nearest entry changes halfway between two, at a multiple of 1/2: floor(2 t) tells it exactly, t = -128 .. 127.5.
OFFSET = 256  # of floor(2 t) in the next two tables
NEAREST = np.searchsorted((TABLE[1:] + TABLE[:-1]) / 2, np.arange(-256, 256) / 2, side="right").astype(np.uint8)
VALUE = TABLE[NEAREST]


def halves(x: Floats, inverse: Floats | np.float32, out: Floats) -> NDArray[np.intp]:
    """floor(2 * inverse * x) + OFFSET for |inverse * x| < 2^14; uses up `out`."""
    t = np.multiply(x, inverse * f32(2), out=out)
    index = np.floor(t, out=t).astype(np.int16)  # by way of 16 bits: half the time of a conversion to 64
    index += OFFSET
    return index.astype(np.intp)


def nearest(x: Floats, inverse: Floats) -> Bytes:
    """Index of the entry nearest to `inverse * x`, of two equally near the higher; same shape as x.

    Where the product is no number (0 times the inverse of a denormal) it is the last one, as in C.
    """
    t = np.multiply(x, inverse, out=scratch("t", x.shape))
    if not np.isfinite(inverse).all():
        t[np.isnan(t)] = np.inf
    t.clip(f32(-128), f32(127), out=t)
    return NEAREST.take(halves(t, f32(1), t))


class TableFit:
    """Scale of each group: x ~ scale * TABLE[level]. Equals the search of `quantize_row_iq4_nl_impl`.

    Candidates put the extreme weight at 127, then at -134 .. -120; for each rounding the weighted least-squares scale
    is kept if it explains more of the group than the best so far.

    Args:
        x: weights, shape (group size, groups).
        w: importance of each weight, same shape.

    Attributes:
        scale: shape (groups,).
    """

    STEPS = range(-7, 8)

    def __init__(self, x: Floats, w: Floats) -> None:
        peak = extreme(x)
        zero = np.abs(peak) < GROUP_MAX_EPS
        peak[zero] = 1
        sum_qx, sum_q2 = self._sums(x, w, f32(1) / (peak / f32(-TABLE[0])))
        scale = np.where(sum_q2 > 0, sum_qx / sum_q2, f32(0))
        best = scale * sum_qx
        for step in self.STEPS:
            sum_qx, sum_q2 = self._sums(x, w, f32(step + TABLE[0]) / peak)
            won = np.flatnonzero((sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2))
            scale[won] = sum_qx[won] / sum_q2[won]
            best[won] = scale[won] * sum_qx[won]
        scale[zero] = 0
        self.scale: Floats = scale

    @staticmethod
    def _sums(x: Floats, w: Floats, inverse: Floats) -> tuple[Floats, Floats]:
        """Sums of w * q * x and of w * q^2 for one candidate, q the table's value nearest to `inverse * x`."""
        t = scratch("t", x.shape)
        q = VALUE.take(halves(x, inverse, t), out=scratch("q", x.shape), mode="clip")
        wq = np.multiply(w, q, out=scratch("wq", x.shape))
        sum_qx = add_up(np.multiply(wq, x, out=t))
        return sum_qx, add_up(np.multiply(wq, q, out=t))
