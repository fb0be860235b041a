"""A plan whose k-quants are searched harder than llama.cpp does, at the same bytes.

Types, order and places stay as they were; only where a tensor's bytes come from changes. It reads no text:
`gguforge.runtime.tune` starts from it and does better wherever it sees the inputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from gguforge.quant.blocks.fields import LEGACY, RANGES
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.embedding import EMBEDDING, embedding_moments
from gguforge.quant.errors import DataError
from gguforge.quant.feedback import damped, encode_with_feedback
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.search.refine import refined
from gguforge.quant.sources import Bytes, Extent, FileSource, Floats, Source

QUALITY_KEY = "gguforge.quality"
"""Metadata key of files that do not hold llama.cpp's bytes."""


@dataclass(frozen=True, eq=False)
class RefinedSource(Source):
    """A tensor encoded on the way, by the better search.

    Attributes:
        origin: where the weights come from.
        type: the k-quant that they are encoded in.
        importance: of each column, shape (matrices, row length), None where all columns matter alike.
        moments: how errors of the columns add up, shape (row length, row length); then importance does not count.
    """

    origin: Source
    type: GGMLQuantizationType
    importance: Floats | None = field(default=None, repr=False)
    moments: Floats | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.origin.shape

    @property
    def paths(self) -> tuple[str, ...]:
        return self.origin.paths

    @property
    def stored(self) -> Source:
        return self.origin

    def raw_rows(self, start: int, stop: int) -> Bytes:
        rows = self.origin.rows(start, stop)
        if not np.isfinite(rows).all():
            raise DataError("holds NaN or infinity", path=next(iter(self.paths), None))
        if self.moments is not None:
            return encode_with_feedback(rows, self.moments, self.type)
        if self.importance is None:
            return refined(rows, self.type)
        per_matrix = int(np.prod(self.shape[:-1])) // len(self.importance)
        cuts = range(start - start % per_matrix, stop, per_matrix)
        parts = [(max(cut, start), min(cut + per_matrix, stop), self.importance[cut // per_matrix]) for cut in cuts]
        return np.concatenate([refined(rows[a - start : b - start], self.type, w) for a, b, w in parts])


@dataclass(frozen=True)
class EncodedSource(Source):
    """A tensor that was encoded before.

    Attributes:
        origin: where its weights came from.
        encoded: its blocks, in a file of their own.
    """

    origin: Source
    encoded: FileSource

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.encoded.shape

    @property
    def type(self) -> GGMLQuantizationType:  # type: ignore[override]
        return self.encoded.type

    @property
    def paths(self) -> tuple[str, ...]:
        return self.origin.paths

    @property
    def stored(self) -> Source:
        return self.origin

    @property
    def extent(self) -> Extent:
        return self.encoded.extent

    def raw_rows(self, start: int, stop: int) -> Bytes:
        return self.encoded.raw_rows(start, stop)


def refine_plan(plan: Plan) -> Plan:
    """The same plan with the better search for all k-quants that are to be encoded.

    The token embedding, of legacy types too, is encoded with feedback where it is known what reads it: see
    `embedding_moments`.
    """
    moments = embedding_moments(plan)
    return replace(plan, tensors=tuple(_refined(tensor, moments) for tensor in plan.tensors))


def _refined(tensor: TensorPlan, moments: Floats | None) -> TensorPlan:
    fits = tensor.name == EMBEDDING and moments is not None and len(moments) == tensor.row_length
    if tensor.is_copy or tensor.type not in ({*RANGES, *LEGACY} if fits else RANGES):
        return tensor
    known = damped(moments) if fits and moments is not None else None
    return replace(tensor, source=RefinedSource(tensor.source, tensor.type, tensor.importance, known))
