"""Evenly spaced blocks taken apart: scales, minimums and levels of every block as numbers, and back into blocks.

What searches beyond llama.cpp's work on: a weight is `d * scale * level - dmin * minimum`, with one scale and minimum
for each group. A legacy block is one group, its scale 1, its minimum -1 if it has one. Columns are blocks, as in
`gguforge.quant.search`. Structs: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import REGISTRY, Blocks, Floats
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.blocks.kquants import SUPER, KQuant
from gguforge.quant.constants import GGMLQuantizationType as T


class Range(NamedTuple):
    """What a type can hold: groups of `size` weights, levels and scales within bounds, minimums 0..minimum."""

    size: int
    level: tuple[int, int]
    scale: tuple[int, int]
    minimum: int

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return 1 if self.scale == FIXED else SUPER // self.size

    @property
    def width(self) -> int:
        """Weights of a block."""
        return self.groups * self.size


FIXED = (1, 1)

RANGES = {
    T.Q2_K: Range(16, (0, 3), (0, 15), 15),
    T.Q3_K: Range(16, (-4, 3), (-32, 31), 0),
    T.Q4_K: Range(32, (0, 15), (0, 63), 63),
    T.Q5_K: Range(32, (0, 31), (0, 63), 63),
    T.Q6_K: Range(16, (-32, 31), (-128, 127), 0),
}
"""The k-quants."""

LEGACY = {
    T.Q4_0: Range(32, (-8, 7), FIXED, 0),
    T.Q4_1: Range(32, (0, 15), FIXED, 1),
    T.Q5_0: Range(32, (-16, 15), FIXED, 0),
    T.Q5_1: Range(32, (0, 31), FIXED, 1),
    T.Q8_0: Range(32, (-127, 127), FIXED, 0),
}
"""Types of one group a block."""


@dataclass
class Fields:
    """n blocks of one type, of k-quants super-blocks.

    Attributes:
        type: the block type.
        d, dmin: the fp16 steps, shape (n,); dmin is 0 for types without minimums, of either sign for legacy ones.
        scale, minimum: whole numbers, shape (groups, n).
        level: whole numbers, shape (width, n).
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
        return range_of(self.type)

    @property
    def step(self) -> Floats:
        """What one level of each group is worth, shape (groups, n)."""
        return self.d * self.scale

    @property
    def offset(self) -> Floats:
        """What each group's weights are lowered by, shape (groups, n)."""
        return self.dmin * self.minimum

    def values(self) -> Floats:
        """The weights, shape (width, n)."""
        groups = self.level.reshape(self.range.groups, self.range.size, -1)
        return (self.step[:, None] * groups - self.offset[:, None]).reshape(self.level.shape)

    def take(self, which: NDArray[np.bool_], other: Fields) -> None:
        """Take some super-blocks, shape (n,), from another of the same shape."""
        for mine, theirs in ((self.d, other.d), (self.dmin, other.dmin)):
            mine[which] = theirs[which]
        for mine, theirs in ((self.scale, other.scale), (self.minimum, other.minimum), (self.level, other.level)):
            mine[:, which] = theirs[:, which]


def range_of(type: T) -> Range:
    """What a type can hold; types that are not evenly spaced are a KeyError."""
    return RANGES[type] if type in RANGES else LEGACY[type]


def unpack(blocks: Blocks, type: T) -> Fields:
    """Take blocks apart, shape (n,)."""
    kind = REGISTRY[type]
    assert issubclass(kind, GroupedBlock)
    scale, minimum = kind.scales(blocks)
    if minimum is None:
        minimum = np.zeros_like(scale)
    d = blocks["d"].astype(np.float32)
    dmin = blocks[kind.offset].astype(np.float32) if kind.offset else np.zeros_like(d)
    columns = [np.ascontiguousarray(array.T, np.float32) for array in (scale, minimum, kind.levels(blocks))]
    return Fields(type, d, dmin, *columns)


def pack(fields: Fields) -> Blocks:
    """Put blocks together, shape (n,); all numbers are within their range."""
    kind, whole = REGISTRY[fields.type], np.int8 if fields.range.scale[0] else np.uint8
    assert issubclass(kind, GroupedBlock)
    out = np.zeros(len(fields.d), kind.layout)
    out["d"] = fields.d
    if kind.offset:
        out[kind.offset] = fields.dmin
    if issubclass(kind, KQuant):
        kind.put_scales(fields.scale.astype(whole), fields.minimum.astype(whole), out)
    kind.put_levels(fields.level.T.astype(np.int8), out)
    return out
