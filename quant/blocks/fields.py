"""The k-quants taken apart: scales, minimums and levels of every super-block as numbers, and back into blocks.

What searches beyond llama.cpp's work on: a weight is `d * scale * level - dmin * minimum`, with one scale and minimum
for each group. Columns are super-blocks, as in `gguforge.quant.search`. Structs: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import REGISTRY, Blocks, Floats
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
    kind = REGISTRY[type]
    assert issubclass(kind, KQuant)
    scale, minimum = kind.scales(blocks)
    if minimum is None:
        minimum = np.zeros_like(scale)
    d = blocks["d"].astype(np.float32)
    dmin = blocks["dmin"].astype(np.float32) if RANGES[type].minimum else np.zeros_like(d)
    columns = [np.ascontiguousarray(array.T, np.float32) for array in (scale, minimum, kind.levels(blocks))]
    return Fields(type, d, dmin, *columns)


def pack(fields: Fields) -> Blocks:
    """Put super-blocks together, shape (n,); all numbers are within their range."""
    kind, whole = REGISTRY[fields.type], np.int8 if fields.range.scale[0] else np.uint8
    assert issubclass(kind, KQuant)
    out = np.empty(len(fields.d), kind.layout)
    out["d"] = fields.d
    if fields.range.minimum:
        out["dmin"] = fields.dmin
    kind.put_scales(fields.scale.astype(whole), fields.minimum.astype(whole), out)
    kind.put_levels(fields.level.T.astype(np.int8), out)
    return out
