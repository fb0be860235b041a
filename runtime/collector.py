"""Adds up the squared inputs of a model's matrices while llama.cpp evaluates, through its evaluation callback.

It sees every node of a graph twice: once before, to say whether it wants the data, and once after. Matrices that read
the same input (query, key and value; gate and up) share one sum. Which matrices count, and how experts are told apart:
llama.cpp, tools/imatrix/imatrix.cpp (collect_imatrix).
"""

from __future__ import annotations

from ctypes import c_int
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import EngineError
from gguforge.quant.imatrix import Entry
from gguforge.runtime.library import library
from gguforge.runtime.tensors import F32, OP_OFFSET, Tensor, operation, view

SMALLEST_BATCH = 16  # tokens; llama-imatrix ignores dense products of fewer

OUTPUT_MATRIX = "output.weight"

Sums = NDArray[np.float64]
Counts = NDArray[np.int64]


class Collector:
    """Sums for all matrices of a model.

    Attributes:
        callback: the ctypes function for llama.cpp; the collector must live as long as the context.

    Args:
        process_output: collect for `output.weight` as well.
        skip_rest: end each graph behind the last matrix that counts. The scores are then garbage. Only for chunks of
            one batch: the state that later batches would start from may be incomplete.
    """

    def __init__(self, process_output: bool = False, skip_rest: bool = False) -> None:
        self._process_output, self._skip_rest = process_output, skip_rest
        self._product, self._routed_product = operation("MUL_MAT"), operation("MUL_MAT_ID")
        self._totals: dict[str, tuple[Sums, Counts]] = {}
        self._part: list[tuple[str, Sums, Counts]] = []  # of the chunk that is being read
        self._known: dict[tuple[int, int], tuple[Sums, Counts]] = {}  # by input and expert ids, in this graph
        self._names: set[str] = set()  # seen in this graph
        self._last: str | None = None  # the last matrix of a whole graph
        self._complete = False
        self._failure: BaseException | None = None
        self.callback = library().ggml_backend_sched_eval_callback(self._called)

    def begin(self) -> None:
        """Forget what the last chunk added that was not kept, and get ready for the next."""
        self._part.clear()
        self._next_graph()

    def keep(self) -> None:
        """Add the chunk that was read to the totals.

        Raises:
            EngineError: a matrix's inputs are not finite, or change their size.
        """
        if self._failure is not None:
            raise self._failure
        for name, sums, counts in self._part:
            if not np.isfinite(sums).all():
                raise EngineError(
                    "its inputs are not finite", tensor=name,
                    remedy="The model is damaged, or its numbers are too large for 16-bit floats.",
                )  # fmt: skip
            if name not in self._totals:
                self._totals[name] = np.zeros(sums.shape), np.zeros(counts.shape, np.int64)
            total, tokens = self._totals[name]
            if total.shape != sums.shape:
                raise EngineError("its inputs change their size", tensor=name)
            total += sums
            tokens += counts
        self._part.clear()
        self._complete = True

    def restore(self, entries: dict[str, Entry]) -> None:
        """Go on from what was collected earlier."""
        for name, entry in entries.items():
            sums = entry.sums.astype(np.float64)
            if entry.rest is not None:
                sums += entry.rest.sum(axis=0, dtype=np.float64)
            self._totals[name] = sums, entry.counts.copy()

    def entries(self, exact: bool = False) -> dict[str, Entry]:
        """What was kept, by tensor name; with what float32 leaves of it if `exact`."""
        return {
            name: Entry(sums.astype(np.float32), counts.copy(), _rest(sums) if exact else None)
            for name, (sums, counts) in self._totals.items()
        }

    def _called(self, address: int, ask: bool, _: object) -> bool:
        try:
            return self._wants(address) if ask else self._take(address)
        except Exception as error:  # noqa: BLE001  (C must not meet it; `keep` raises it)
            self._failure = error
            return False

    def _next_graph(self) -> None:
        self._known.clear()
        self._names.clear()

    def _wants(self, address: int) -> bool:
        op = c_int.from_address(address + OP_OFFSET).value
        if op not in (self._product, self._routed_product):
            return False
        tensor = Tensor.from_address(address)
        name = _name(tensor)
        if op == self._product and not self._counts(name, Tensor.from_address(tensor.src[1])):
            return False
        if name in self._names:
            self._next_graph()  # tensors of the last graph are gone, their addresses may come again
        self._names.add(name)
        if not self._complete:
            self._last = name
        known = self._known.get(_key(tensor))
        if known is None:
            return True
        self._part.append((name, *known))
        return self._ends(name)

    def _counts(self, name: str, inputs: Tensor) -> bool:
        if inputs.type != F32 or inputs.ne[1] < SMALLEST_BATCH:
            return False
        return name.startswith("blk.") or (self._process_output and name == OUTPUT_MATRIX)

    def _take(self, address: int) -> bool:
        tensor = Tensor.from_address(address)
        name, key = _name(tensor), _key(tensor)
        if key not in self._known:
            routed = tensor.op == self._routed_product
            self._known[key] = found = _routed_sums(tensor) if routed else _dense_sums(tensor)
            self._part.append((name, *found))
        return not self._ends(name)

    def _ends(self, name: str) -> bool:
        """Whether nothing that counts comes after this matrix; known once a whole chunk was read."""
        return self._skip_rest and self._complete and name == self._last


def _rest(sums: Sums) -> NDArray[np.float32]:
    """What float32 leaves of sums, and what it leaves of that: 3 times 24 bits hold the 53 of a float64."""
    left = sums - sums.astype(np.float32)
    once = left.astype(np.float32)
    return np.stack([once, (left - once).astype(np.float32)])


def _name(tensor: Tensor) -> str:
    """The matrix's name, without what schedulers put around it: `CUDA0#blk.0.attn_k.weight#0`."""
    name: str = Tensor.from_address(tensor.src[0]).name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name


def _key(tensor: Tensor) -> tuple[int, int]:
    """Input and expert ids; stacks of matrices are told apart by their size."""
    matrix = Tensor.from_address(tensor.src[0])
    return tensor.src[1], tensor.src[2] or -(matrix.ne[2] * matrix.ne[3])


def _dense_sums(tensor: Tensor) -> tuple[Sums, Counts]:
    """Shapes (1, matrices * columns) and (1,); activations of more dimensions than the matrix has are flattened."""
    matrix, inputs = Tensor.from_address(tensor.src[0]), Tensor.from_address(tensor.src[1])
    x = view(inputs, tensor.src[1], np.float32)
    depth, wide = matrix.ne[2], matrix.ne[2] * matrix.ne[3]
    sums = np.zeros((wide, x.shape[-1]))
    for i3 in range(x.shape[0]):
        for i2 in range(x.shape[1]):
            sums[i3 % matrix.ne[3] * depth + i2 % depth] += squares(x[i3, i2])
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    return sums.reshape(1, -1), np.array([rows // wide])


def _routed_sums(tensor: Tensor) -> tuple[Sums, Counts]:
    """Shapes (experts, columns) and (experts,): each token counts for the experts that it was sent to."""
    experts = Tensor.from_address(tensor.src[0]).ne[2]
    ids = view(Tensor.from_address(tensor.src[2]), tensor.src[2], np.int32)[0, 0]  # (tokens, experts used)
    x = view(Tensor.from_address(tensor.src[1]), tensor.src[1], np.float32)[0]  # (tokens, 1 or experts used, columns)
    sums = np.zeros((experts, x.shape[-1]))
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    order = np.argsort(ids.reshape(-1), kind="stable")
    token, slot = order // ids.shape[1], order % ids.shape[1] % x.shape[1]
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            sums[expert] = squares(x[token[start : start + count], slot[start : start + count]])
        start += count
    return sums, counts


def squares(x: NDArray[Any]) -> NDArray[np.float32]:
    """Sums of the squares of each column, shape (rows, columns) -> (columns,), without a copy of the input.

    In float32 row by row, as llama-imatrix adds them; 512 rows lose no more than one part in 100,000.

    >>> squares(np.array([[1, 2], [3, 4]], np.float32)).tolist()
    [10.0, 20.0]
    """
    sums: NDArray[np.float32] = np.einsum("ij,ij->j", x, x)
    return sums
