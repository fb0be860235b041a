"""Weights that lie on a quantization grid already are written on it, without loss: what `--quality lossless` adds.

So are weights after quantization-aware training, and those of a quantized file that was turned into 16-bit floats. A
type holds a tensor without loss if its blocks decode to numbers that are the stored weights, bit for bit, once they are
rounded to the type that the weights are stored in (0 and -0 count as the same). How blocks are found:
`gguforge.quant.search.recover`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from gguforge.quant.blocks import encode
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import UNQUANTIZED
from gguforge.quant.search.recover import gives_back, recover
from gguforge.quant.search.steps import interval, steps_of
from gguforge.quant.sources import Bytes, Floats, Source

TYPES = (
    T.Q1_0, T.TQ1_0, T.TQ2_0, T["Q2_0"], T.Q2_K, T.Q3_K, T.MXFP4, T.Q4_0, T.Q4_K, T.Q4_1, T.Q5_0, T.Q5_K, T.Q5_1,
    T.Q6_K, T.Q8_0,
)  # fmt: skip
"""Types whose grids are known, by their size, smallest first."""

SAMPLE = 1024  # weights of one row
PLACES = 4  # rows of a sample, spread over the tensor
AT_ONCE = 1 << 18  # weights
LOOK = 3  # tensors by which `hint` judges a model

SHORT, LONG = 16, 32  # weights that share a step in every type, and in those of 8 bits
STEPS = tuple(range(1, 33)), tuple(range(127, 63, -1))


@dataclass(frozen=True, eq=False)
class LosslessSource(Source):
    """A tensor on the grid of a type, put on it on the way.

    Attributes:
        origin: where the weights come from.
        type: the type that holds them.
    """

    origin: Source
    type: T

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
        found = _recovered(self.origin, self.type, start, stop)
        if found is None:
            raise DataError("is not on its grid any more", path=next(iter(self.paths), None))
        return found


def lossless_plan(plan: Plan) -> Plan:
    """The same plan, in which tensors that lie on a grid are written without loss.

    A tensor is written in the smallest type that holds it, in the plan's among types of one size; if none up to the
    size of the plan's type does, it is left as it was. Weights that look as if they were on a grid are all read.

    Raises:
        GGUForgeError: a source cannot be read.
    """
    return replace(plan, tensors=tuple(map(_lossless, plan.tensors)))


def _lossless(tensor: TensorPlan) -> TensorPlan:
    for type in _candidates(tensor):
        if all(_recovered(tensor.source, type, *rows) is not None for rows in _slabs(tensor)):
            return replace(
                tensor, type=type, source=LosslessSource(tensor.source, type), fallback=None, importance=None,
                reason=f"lossless: the weights lie on the grid of {type.name}",
            )  # fmt: skip
    return tensor


def is_lossless(tensor: TensorPlan) -> bool:
    """Whether a tensor of a plan is written on its grid."""
    return isinstance(tensor.source, LosslessSource)


def hint(plan: Plan) -> tuple[str, T] | None:
    """A tensor that could be written without loss, and by the plan is not; judged by samples of the first matrices."""
    for tensor in [tensor for tensor in plan.tensors if _is_encoded(tensor)][:LOOK]:
        found = next(_candidates(tensor), None)
        if found is not None:
            blocks = _sample(tensor).reshape(-1, GGML_QUANT_SIZES[tensor.type][0])
            if not gives_back(encode(blocks, tensor.type), tensor.type, blocks, tensor.source.type).all():
                return tensor.name, found
    return None


def _is_encoded(tensor: TensorPlan) -> bool:
    return not tensor.is_copy and tensor.source.type in UNQUANTIZED and tensor.type not in UNQUANTIZED


def _candidates(tensor: TensorPlan) -> Iterator[T]:
    """The types that hold a sample of a tensor, smallest first."""
    if not _is_encoded(tensor) or not tensor.rows:
        return
    rows, stored = _sample(tensor), tensor.source.type
    if not rows.size or not np.isfinite(rows).all() or not _looks_even(rows, stored):
        return
    fitting = [type for type in TYPES if _bits(type) <= _bits(tensor.type)]
    for type in sorted(fitting, key=lambda type: (_bits(type), type != tensor.type)):
        size = GGML_QUANT_SIZES[type][0]
        if tensor.row_length % size == 0:
            whole = rows[:, : rows.shape[1] // size * size]
            if recover(whole.reshape(-1, size), type, stored)[1].all():
                yield type


def _bits(type: T) -> float:
    size, nbytes = GGML_QUANT_SIZES[type]
    return nbytes / size


def _sample(tensor: TensorPlan) -> Floats:
    """The beginnings of some rows, shape (rows, weights), not the first: there embeddings have unused tokens."""
    places = sorted({(2 * place + 1) * tensor.rows // (2 * PLACES) for place in range(PLACES)})
    return np.concatenate([tensor.source.rows(row, row + 1)[:, :SAMPLE] for row in places])


def _looks_even(rows: Floats, stored: T) -> bool:
    """Whether the first weights of rows are whole numbers of steps, in the way of any type; it takes milliseconds."""
    for size, tops in zip((SHORT, LONG), STEPS, strict=True):
        groups = rows[:, : min(rows.shape[1], 4 * LONG) // size * size].reshape(-1, size).T
        low, high = interval(groups, stored)
        for minimums in (False, True)[: 1 + (size == SHORT)]:
            with np.errstate(all="ignore"):
                if steps_of(groups.astype(np.float64), low, high, tops, minimums).found.all():
                    return bool(groups.size)
    return False


def _slabs(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    step = max(1, AT_ONCE // tensor.row_length)
    for start in range(0, tensor.rows, step):
        yield start, min(tensor.rows, start + step)


def _recovered(source: Source, type: T, start: int, stop: int) -> Bytes | None:
    """Rows as blocks of a type, shape (rows, bytes of a row); None where it does not hold them."""
    rows = source.rows(start, stop)
    if not np.isfinite(rows).all():
        return None
    data, found = recover(rows.reshape(-1, GGML_QUANT_SIZES[type][0]), type, source.type)
    return data.reshape(len(rows), -1) if found.all() else None
