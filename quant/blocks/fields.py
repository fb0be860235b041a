"""The k-quants taken apart: scales, minimums and levels of every super-block as numbers, and back into blocks.

What searches beyond llama.cpp's work on: a weight is `d * scale * level - dmin * minimum`, with one scale and minimum
for each group. Columns are super-blocks, as in `gguforge.quant.search`. Structs: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import REGISTRY, Blocks, Floats
from gguforge.quant.blocks.kquants import SUPER, fold, pack_2bit, pack_6bit, u8, unpack_2bit, unpack_6bit
from gguforge.quant.constants import GGMLQuantizationType as T


class Range(NamedTuple):
    """What a type can hold: groups of `size` weights, levels and scales within bounds, minimums 0..minimum."""

    size: int
    level: tuple[int, int]
    scale: tuple[int, int]
    minimum: int

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return SUPER // self.size


RANGES = {
    T.Q2_K: Range(16, (0, 3), (0, 15), 15),
    T.Q3_K: Range(16, (-4, 3), (-32, 31), 0),
    T.Q4_K: Range(32, (0, 15), (0, 63), 63),
    T.Q5_K: Range(32, (0, 31), (0, 63), 63),
    T.Q6_K: Range(16, (-32, 31), (-128, 127), 0),
}


@dataclass
class Fields:
    """n super-blocks of one type.

    Attributes:
        type: the block type.
        d, dmin: the fp16 steps, shape (n,); dmin is 0 for types without minimums.
        scale, minimum: whole numbers, shape (groups, n).
        level: whole numbers, shape (256, n).
    """

    type: T
    d: Floats
    dmin: Floats
    scale: Floats
    minimum: Floats
    level: Floats

    @property
    def range(self) -> Range:
        """What the type can hold."""
        return RANGES[self.type]

    @property
    def step(self) -> Floats:
        """What one level of each group is worth, shape (groups, n)."""
        return self.d * self.scale

    @property
    def offset(self) -> Floats:
        """What each group's weights are lowered by, shape (groups, n)."""
        return self.dmin * self.minimum

    def values(self) -> Floats:
        """The weights, shape (256, n)."""
        groups = self.level.reshape(self.range.groups, self.range.size, -1)
        return (self.step[:, None] * groups - self.offset[:, None]).reshape(SUPER, -1)

    def take(self, which: NDArray[np.bool_], other: Fields) -> None:
        """Take some super-blocks, shape (n,), from another of the same shape."""
        for mine, theirs in ((self.d, other.d), (self.dmin, other.dmin)):
            mine[which] = theirs[which]
        for mine, theirs in ((self.scale, other.scale), (self.minimum, other.minimum), (self.level, other.level)):
            mine[:, which] = theirs[:, which]


def unpack(blocks: Blocks, type: T) -> Fields:
    """Take blocks of a k-quant apart, shape (n,)."""
    d = blocks["d"].astype(np.float32)
    dmin = blocks["dmin"].astype(np.float32) if RANGES[type].minimum else np.zeros_like(d)
    scale, minimum = _scales(blocks, type)
    level = _levels(blocks, type)
    columns = [np.ascontiguousarray(array.T, np.float32) for array in (scale, minimum, level)]
    return Fields(type, d, dmin, *columns)


def _scales(b: Blocks, type: T) -> tuple[Any, Any]:
    """Scales and minimums, shape (n, groups) each."""
    if type in (T.Q4_K, T.Q5_K):
        return unpack_6bit(b["scales"])
    if type == T.Q2_K:
        return b["scales"] & u8(15), b["scales"] >> u8(4)
    scale = b["scales"]
    if type == T.Q3_K:
        low = np.concatenate([scale[:, :8] & u8(15), scale[:, :8] >> u8(4)], axis=1)
        high = np.concatenate([scale[:, 8:] >> u8(shift) & u8(3) for shift in (0, 2, 4, 6)], axis=1)
        scale = (low | high << u8(4)).astype(np.int8) - np.int8(32)
    return scale, np.zeros_like(scale)


def _levels(b: Blocks, type: T) -> Any:
    """Levels as they are counted in `RANGES`, shape (n, 256)."""
    if type == T.Q2_K:
        return unpack_2bit(b["qs"])
    if type == T.Q3_K:
        high = np.unpackbits(b["hmask"].reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, SUPER)
        return unpack_2bit(b["qs"]).astype(np.int8) - (high ^ u8(1)).astype(np.int8) * np.int8(4)
    if type == T.Q6_K:
        ql = b["ql"].reshape(-1, 2, 1, 2, 32)
        low = np.concatenate([ql & u8(15), ql >> u8(4)], axis=2).reshape(-1, 2, 4, 32)
        high = b["qh"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & u8(3)
        return (low | high << u8(4)).astype(np.int8).reshape(-1, SUPER) - np.int8(32)
    q = b["qs"].reshape(-1, 4, 1, 32)
    q = np.concatenate([q & u8(15), q >> u8(4)], axis=2)
    if type == T.Q5_K:
        q |= np.unpackbits(b["qh"].reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, 4, 2, 32) << u8(4)
    return q.reshape(-1, SUPER)


def pack(fields: Fields) -> Blocks:
    """Put super-blocks together, shape (n,); all numbers are within their range."""
    type, (low, _) = fields.type, fields.range.level
    out = np.empty(len(fields.d), REGISTRY[type].layout)
    level = np.ascontiguousarray((fields.level - np.float32(low)).astype(np.uint8).T)
    scale = (fields.scale - np.float32(fields.range.scale[0] if type == T.Q3_K else 0)).astype(np.int16)
    minimum = fields.minimum.astype(np.uint8)
    out["d"] = fields.d
    if fields.range.minimum:
        out["dmin"] = fields.dmin
    _PACKERS[type](out, scale.astype(np.int8).view(np.uint8), minimum, level)
    return out


def _pack_q2(out: Blocks, scale: NDArray[np.uint8], minimum: NDArray[np.uint8], level: NDArray[np.uint8]) -> None:
    out["scales"] = (scale | minimum << u8(4)).T
    out["qs"] = pack_2bit(level)


def _pack_q3(out: Blocks, scale: NDArray[np.uint8], _: NDArray[np.uint8], level: NDArray[np.uint8]) -> None:
    low, high = scale & u8(15), scale >> u8(4)
    packed = np.empty((12, len(out)), np.uint8)
    packed[:8] = low[:8] | low[8:] << u8(4)
    packed[8:] = high[0:4] | high[4:8] << u8(2) | high[8:12] << u8(4) | high[12:16] << u8(6)
    out["scales"] = packed.T
    out["hmask"] = np.packbits((level > 3).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    out["qs"] = pack_2bit(level & u8(3))


def _pack_q45(out: Blocks, scale: NDArray[np.uint8], minimum: NDArray[np.uint8], level: NDArray[np.uint8]) -> None:
    out["scales"] = pack_6bit(scale, minimum)
    out["qs"] = fold((level & u8(15)).reshape(-1, 64), 4).reshape(-1, 128)
    if "qh" in (out.dtype.names or ()):
        out["qh"] = np.packbits((level > 15).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _pack_q6(out: Blocks, scale: NDArray[np.uint8], _: NDArray[np.uint8], level: NDArray[np.uint8]) -> None:
    halves = level.reshape(-1, 128)
    out["scales"] = scale.view(np.int8).T
    out["ql"] = fold(halves & u8(15), 4).reshape(-1, 128)
    out["qh"] = fold(fold(np.ascontiguousarray(halves >> u8(4)), 4), 2).reshape(-1, 64)


_PACKERS = {T.Q2_K: _pack_q2, T.Q3_K: _pack_q3, T.Q4_K: _pack_q45, T.Q5_K: _pack_q45, T.Q6_K: _pack_q6}
