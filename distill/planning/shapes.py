"""Shapes that a student may have: layers, widths and heads, of a few numbers each.

All widths are multiples of 256, so that every matrix takes k-quants. Below a billion weights models are deep and thin,
with shared embeddings and grouped queries, as MobileLLM found best (arXiv:2402.14905: 30 layers of 576, 32 of 960, 54
of 1280); above, the field builds wider ones (hidden size 32 to 128 times the layers). MobileLLM also found distillation
slower than labels and no better for such students; so every recipe measures a baseline without a teacher.

A student that is cut keeps its teacher's heads, and loses layers and channels (Minitron: arXiv:2407.14679).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

UNIT = 256  # of every width: a super-block of k-quants
BILLION = 10**9
THIN, WIDE = (16, 40), (32, 128)  # hidden size over layers, below and above a billion weights
WIDEST = 8192
GATED = 8 / 3  # feed-forward over hidden size that gives a gated feed-forward the weights of an ungated one of 4
GROUP = 4  # query heads that share keys and values


@dataclass(frozen=True)
class Shape:
    """One model's sizes.

    Attributes:
        layers: transformer blocks.
        hidden, ffn: the hidden and the feed-forward size.
        heads, kv_heads, head: of queries, of keys and values, and the size of each.
        tied: whether the embedding is the output matrix too.
        cut: whether it is a part of the teacher, not new.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    tied: bool
    cut: bool

    @property
    def body(self) -> int:
        """Weights without the embeddings; biases and the norms of heads, which some families have, are not counted."""
        attention = 2 * self.hidden * self.head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn + 2 * self.hidden) + self.hidden

    def weights(self, vocabulary: int) -> int:
        """All weights, likewise."""
        return self.body + vocabulary * self.hidden * (1 if self.tied else 2)

    def cache(self, context: int) -> int:
        """Bytes of 16-bit keys and values for so many tokens."""
        return 4 * context * self.layers * self.kv_heads * self.head

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.hidden}, ffn {self.ffn}, heads {self.heads}/{self.kv_heads}"


def new_shapes(teacher: Shape) -> Iterator[Shape]:
    """Students that begin with random weights: no wider than the teacher, and smaller."""
    head = teacher.head if UNIT % teacher.head == 0 else 64
    widest = min(WIDEST, -(-teacher.hidden // UNIT) * UNIT)
    groups = {GROUP, max(1, teacher.heads // teacher.kv_heads)}
    ratios = {GATED, teacher.ffn / teacher.hidden}
    for hidden in range(UNIT, widest + 1, UNIT):
        heads = hidden // head
        for ffn in sorted({max(UNIT, round(ratio * hidden / UNIT) * UNIT) for ratio in ratios}):
            for kv_heads in sorted({max(1, heads // group) for group in groups if heads % max(1, heads // group) == 0}):
                for layers in range(hidden // WIDE[1] or 1, hidden // THIN[0] + 1):
                    shape = Shape(layers, hidden, ffn, heads, kv_heads, head, tied=True, cut=False)
                    low, high = THIN if shape.body < BILLION else WIDE
                    if low <= hidden / layers <= high and shape.body < teacher.body:
                        yield shape


def cut_shapes(teacher: Shape) -> Iterator[Shape]:
    """Students that are parts of the teacher: fewer layers, fewer channels, all heads."""
    ratio = teacher.ffn / teacher.hidden
    widths = {hidden: max(UNIT, round(ratio * hidden / UNIT) * UNIT) for hidden in range(UNIT, teacher.hidden, UNIT)}
    for hidden, ffn in [*widths.items(), (teacher.hidden, teacher.ffn)]:
        for layers in range(max(1, teacher.layers // 4), teacher.layers + 1):
            shape = replace(teacher, layers=layers, hidden=hidden, ffn=min(ffn, teacher.ffn), cut=True)
            if shape.body < teacher.body and hidden >= THIN[0] * layers:
                yield shape
