"""The ternary types on a grid of 8 weights: IQ1_S, IQ1_M.

Equal `quantize_row_iq1_*_impl` and `dequantize_row_iq1_*` of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats, f2, u1
from gguforge.quant.blocks.iq import in_blocks, squares
from gguforge.quant.blocks.kquants import per_block, per_group
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.base import add_up, as_groups, f32, nearest_int
from gguforge.quant.search.grids import grid
from gguforge.quant.search.splits import DELTA
from gguforge.quant.search.ternary import TernaryFit

TILE = 1024
THREES = np.array([0, 3, 6, 9], np.uint16)


def fit_groups(x: Floats, w: Floats, size: int, smallest: float) -> tuple[TernaryFit, Floats]:
    """The search over groups of `size` weights, and the scale of each; small groups have none."""
    groups, weights = as_groups(x, size), as_groups(w, size, "weights")
    small = np.abs(groups).max(axis=0) < f32(smallest)
    weights[:, small] = 0
    fit = TernaryFit(groups, weights, 1 if size == 32 else 2)
    none = ~fit.found | small
    fit.scale[none] = 0
    fit.index[:, none] = 0
    fit.down[:, none] = False
    return fit, fit.scale


def round_odd_8(scales: Floats) -> tuple[Bytes, Floats]:
    """Scales (groups, n) as odd multiples 2 * code + 1 of a step, codes 0..7, and the step; the largest gets 15."""
    d = scales.max(axis=0) / f32(15)
    codes = nearest_int(f32(0.5) * (f32(1) / d * scales - f32(1)))  # where all are zero: that of no number, 0
    return codes.clip(0, 7).astype(np.uint8), d


class IQ1_S(
    Block, type=T.IQ1_S, size=256, tile=TILE, weighted_tile=TILE, importance="twice", required=True,
    d=f2, qs=(u1, 32), qh=("<u2", 8),
):  # fmt: skip
    """2048 grid points; 8 groups of 32 with 3-bit scales and a shift: 1.5625 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        assert w is not None
        fit, scale = fit_groups(x, w, 32, 1e-12)
        codes, d = round_odd_8(per_block(scale, 8))
        out["d"] = (d * f32(1.125)).astype(np.float16)
        index = in_blocks(fit.index, len(x))
        out["qs"] = index.astype(np.uint8)
        high = (index >> 8).astype(np.uint16).reshape(-1, 8, 4) << THREES
        last = codes.T.astype(np.uint16) | in_blocks(fit.down[:1], len(x)).astype(np.uint16) << np.uint16(3)
        last[scale.reshape(len(x), -1).max(axis=1) == 0] = 0
        out["qh"] = np.bitwise_or.reduce(high, axis=2) | last << np.uint16(12)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        qh = b["qh"]
        step = b["d"].astype(np.float32)[:, None] * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
        shift = np.where(qh & 0x8000, -DELTA, DELTA)
        index = b["qs"] | ((qh[..., None] >> THREES & 7) << 8).reshape(-1, 32)
        points = grid("IQ1_S").points[index].reshape(-1, 8, 32)
        return (step[..., None] * (points + shift[..., None])).reshape(-1, 256)


class IQ1_M(
    Block, type=T.IQ1_M, size=256, tile=TILE, weighted_tile=TILE, importance="twice",
    qs=(u1, 32), qh=(u1, 16), scales=("<u2", 4),
):  # fmt: skip
    """2048 grid points, each with a shift; 16 groups of 16 with 3-bit scales: 1.75 bpw.

    The step of the scales is spread over the highest four bits of the four words of scales.
    """

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        w = squares(x) if w is None else w
        fit, scale = fit_groups(x, w, 16, 1e-7)
        scales = per_block(scale, 16)
        codes, d = round_odd_8(scales)
        # One least-squares fit of the step to the whole super-block, with the scales that will be read back.
        odd = (2 * codes + 1).astype(np.float32)
        q = fit.values(np.arange(x.size // 16)) * per_group(odd)
        q = np.ascontiguousarray(q.T).reshape(-1, 256).T
        wq = np.ascontiguousarray(w.T * q)
        sum_qx, sum_q2 = add_up(wq * x.T), add_up(wq * q)
        d = np.where(sum_q2 > 0, sum_qx / sum_q2, d)
        empty = scales.max(axis=0) == 0
        index, down = in_blocks(fit.index, len(x)), in_blocks(fit.down, len(x))
        out["qs"] = index.astype(np.uint8)
        nibble = (index >> 8).astype(np.uint8) | (down & ~empty[:, None]).astype(np.uint8) << np.uint8(3)
        out["qh"] = nibble[:, 0::2] | nibble[:, 1::2] << np.uint8(4)
        words = np.bitwise_or.reduce(codes.T.astype(np.uint16).reshape(-1, 4, 4) << THREES, axis=2)
        bits = (d * f32(1.1125)).astype(np.float16).view(np.uint16)
        words |= (bits[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15) << np.uint16(12)
        words[empty] = 0
        out["scales"] = words

    @staticmethod
    def step(b: Blocks) -> NDArray[np.float16]:
        """The step of the scales, shape (n,)."""
        parts = (b["scales"] >> np.uint16(12)) << np.array([0, 4, 8, 12], np.uint16)
        steps: NDArray[np.float16] = np.bitwise_or.reduce(parts, axis=1).view(np.float16)
        return steps

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        codes = (b["scales"][..., None] >> THREES & 7).reshape(-1, 16)
        step = IQ1_M.step(b).astype(np.float32)[:, None] * (2 * codes + 1).astype(np.float32)
        nibble = np.stack([b["qh"] & np.uint8(15), b["qh"] >> np.uint8(4)], axis=2).reshape(-1, 32)
        shift = np.where(nibble & 8, -DELTA, DELTA)
        points = grid("IQ1_S").points[b["qs"] | (nibble & 7).astype(np.uint16) << 8] + shift[..., None]
        return (step[..., None] * points.reshape(-1, 16, 16)).reshape(-1, 256)

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1).view(cls.layout)
        return bool(np.isfinite(cls.step(blocks)).all())
