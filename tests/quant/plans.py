"""Strategies for Hypothesis: any plan, with every kind of metadata, every tensor type and odd shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from hypothesis import strategies as st

from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguforge.quant.metadata import Scalar, Value, uint32
from gguforge.quant.plan import DEFAULT_ALIGNMENT, Plan, TensorPlan
from gguforge.quant.sources import Bytes, Source

K = GGUFValueType
RANGES = {
    K.UINT8: (0, 2**8 - 1),
    K.INT8: (-(2**7), 2**7 - 1),
    K.UINT16: (0, 2**16 - 1),
    K.INT16: (-(2**15), 2**15 - 1),
    K.UINT32: (0, 2**32 - 1),
    K.INT32: (-(2**31), 2**31 - 1),
    K.UINT64: (0, 2**64 - 1),
    K.INT64: (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Pattern(Source):
    """A tensor of any stored type whose bytes are all below 60: finite numbers and scales in every type."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType

    def raw_rows(self, start: int, stop: int) -> Bytes:
        everything = np.arange(prod(self.shape[:-1]) * self.row_bytes, dtype=np.uint64) * 7 % 60
        return everything.astype(np.uint8).reshape(-1, self.row_bytes)[start:stop]


def texts(max_size: int = 12) -> st.SearchStrategy[str]:
    """Any bytes as GGUF keeps them, and any Unicode: control characters, emoji, right to left."""
    raw = st.binary(max_size=max_size).map(lambda data: data.decode("utf-8", "surrogateescape"))
    return raw | st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size)


def scalars(kind: GGUFValueType) -> st.SearchStrategy[Scalar]:
    """Any value of a type."""
    if kind == K.STRING:
        return texts()
    if kind == K.BOOL:
        return st.booleans()
    if kind in (K.FLOAT32, K.FLOAT64):
        return st.floats(width=32 if kind == K.FLOAT32 else 64, allow_nan=False)  # NaN does not equal itself
    return st.integers(*RANGES[kind])


@st.composite
def values(draw: st.DrawFn) -> Value:
    """Any metadata value."""
    kind = draw(st.sampled_from(list(K)))
    if kind != K.ARRAY:
        return Value(kind, draw(scalars(kind)))
    item = draw(st.sampled_from([item for item in K if item != K.ARRAY]))
    return Value(kind, draw(st.lists(scalars(item), max_size=5)), item)


def names(max_bytes: int) -> st.SearchStrategy[str]:
    """Not empty, and no longer than that when encoded."""
    return texts().filter(lambda name: 0 < len(name.encode("utf-8", "surrogateescape")) <= max_bytes)


@st.composite
def tensors(draw: st.DrawFn, name: str) -> TensorPlan:
    """A tensor of any type and shape."""
    kind = draw(st.sampled_from(sorted(GGML_QUANT_SIZES)))
    row = GGML_QUANT_SIZES[kind][0] * draw(st.integers(0, 3))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), row)
    return TensorPlan(name, shape, kind, Pattern(shape, kind))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A whole file."""
    metadata = draw(st.dictionaries(names(60).filter(lambda key: key != "general.alignment"), values(), max_size=5))
    alignment = draw(st.sampled_from([1, 2, 16, 32, 64, 4096]))
    if alignment != DEFAULT_ALIGNMENT:
        metadata["general.alignment"] = uint32(alignment)
    found = [draw(tensors(name)) for name in draw(st.lists(names(63), max_size=4, unique=True))]
    return Plan(metadata, tuple(found), alignment)
