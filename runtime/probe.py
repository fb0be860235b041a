"""Looks into llama.cpp's graph while it runs: which matrices of a block read which inputs, and what those inputs are.

A block's matrices fall into stages: matrices that read the same input (query, key and value) form one, in the order of
the graph. Where a matrix's output is added to another tensor of its shape (the residual stream), that sum can be read
too. Everything is found from the graph itself, so no architecture is written down here.
"""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import EngineError
from gguforge.runtime.library import library
from gguforge.runtime.tensors import F32, OP_OFFSET, Tensor, operation, view

HEAD = "output.weight"
PASSING = ("GET_ROWS", "RESHAPE", "VIEW", "CONT")
"""Operations that hand a matrix's output on as it is; the rows that GET_ROWS picks are all of them, in order."""

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """Matrices that read the same input.

    Attributes:
        names: as they are called in the file that was run, in the order of the graph.
        summed: those whose outputs are added to a tensor of the same shape.
    """

    names: tuple[str, ...]
    summed: frozenset[str]


@dataclass
class Found:
    """What one chunk gave.

    Attributes:
        inputs: of the stage, shape (tokens, columns).
        sums: by matrix, what its output was added up to, shape (tokens, rows).
        output: of the whole block, shape (tokens, width).
    """

    inputs: Rows | None
    sums: dict[str, Rows]
    output: Rows | None


class Probe:
    """The callback for one block.

    Attributes:
        callback: the ctypes function for llama.cpp; the probe must live as long as the context.

    Args:
        layer: the block's number in the file that is run.
        head: whether `output.weight` counts as one of its matrices.
    """

    def __init__(self, layer: int, head: bool = False) -> None:
        self._prefix, self._output_name, self._head = f"blk.{layer}.", f"l_out-{layer}".encode(), head
        self._product, self._sum = operation("MUL_MAT"), operation("ADD")
        self._passing = {operation(name) for name in PASSING}
        self._failure: BaseException | None = None
        self.begin()
        self.callback = library().ggml_backend_sched_eval_callback(self._called)

    def begin(self, stage: Stage | None = None, output: bool = False) -> None:
        """Get ready for the next graph.

        Args:
            stage: read its input and sums, and stop behind the last of them.
            output: read the block's output; without either, the graph is only surveyed.
        """
        self.found = Found(None, {}, None)
        self._stage, self._want_output = stage, output
        self._of: dict[int, str] = {}  # matrix by the address of its output, or of what hands it on
        self._readers: dict[int, list[str]] = {}  # matrices by the address of their input
        self._summed: dict[int, str] = {}  # matrix by the address of the sum

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the graph that was run."""
        summed = frozenset(self._summed.values())
        return tuple(Stage(tuple(names), summed & frozenset(names)) for names in self._readers.values())

    def check(self) -> None:
        """Raise what went wrong in the callback, or that something wanted is missing or not finite."""
        if self._failure is not None:
            raise self._failure
        stage, found = self._stage, self.found
        wanted = [*([found.inputs] if stage else []), *([found.output] if self._want_output else [])]
        wanted += [found.sums.get(name) for name in stage.summed] if stage else []
        for array in wanted:
            if array is None:
                raise EngineError("the graph of a block changes from one chunk to the next")
            if not np.isfinite(array).all():
                raise EngineError(
                    "the inputs of a block's matrices are not finite",
                    remedy="The model is damaged, or its numbers are too large for 16-bit floats.",
                )

    def _called(self, address: int, ask: bool, _: object) -> bool:
        try:
            return self._wants(address) if ask else self._take(address)
        except Exception as error:  # noqa: BLE001  (C must not meet it; `check` raises it)
            self._failure = error
            return False

    def _wants(self, address: int) -> bool:
        op = c_int.from_address(address + OP_OFFSET).value
        if op == self._product:
            return self._is_stage(self._note_product(address))
        if op in self._passing:
            tensor = Tensor.from_address(address)
            if tensor.src[0] in self._of:
                self._of[address] = self._of[tensor.src[0]]
        elif op == self._sum:
            self._note_sum(address)
        return self._wants_sum(address) or self._wants_output(address)

    def _is_stage(self, name: str | None) -> bool:
        return self._stage is not None and name == self._stage.names[0]

    def _wants_sum(self, address: int) -> bool:
        return self._stage is not None and self._summed.get(address) in self._stage.summed

    def _wants_output(self, address: int) -> bool:
        return self._want_output and bool(Tensor.from_address(address).name == self._output_name)

    def _note_product(self, address: int) -> str | None:
        """The matrix's name, if it is one of the block's."""
        tensor = Tensor.from_address(address)
        matrix, inputs = Tensor.from_address(tensor.src[0]), Tensor.from_address(tensor.src[1])
        name: str = matrix.name.decode("utf-8", "replace")
        plain = matrix.ne[2] == matrix.ne[3] == 1 and inputs.type == F32
        if not plain or not ((self._head and name == HEAD) or name.startswith(self._prefix)):
            return None
        self._of[address] = name
        self._readers.setdefault(tensor.src[1], []).append(name)
        return name

    def _note_sum(self, address: int) -> None:
        """A sum of one matrix's output and something else: a bias is passed, the residual stream is noted."""
        tensor = Tensor.from_address(address)
        of = [self._of.get(tensor.src[i]) for i in (0, 1)]
        if (of[0] is None) == (of[1] is None):
            return
        name, other = (of[0], 1) if of[0] is not None else (of[1], 0)
        assert name is not None
        if tuple(Tensor.from_address(tensor.src[other]).ne) == tuple(tensor.ne):
            if name not in self._summed.values():
                self._summed[address] = name
        else:
            self._of[address] = name

    def _take(self, address: int) -> bool:
        """Copy what is wanted; False ends the graph."""
        tensor, found, stage = Tensor.from_address(address), self.found, self._stage
        if tensor.op == self._product:
            found.inputs = _rows(tensor.src[1])
        if self._wants_sum(address):
            found.sums[self._summed[address]] = _rows(address)
        if self._wants_output(address):
            found.output = _rows(address)
        done = stage is None or (found.inputs is not None and stage.summed <= found.sums.keys())
        return not (done and (found.output is not None or not self._want_output))


def _rows(address: int) -> Rows:
    """A copy of a tensor of float32, all axes but the last as one."""
    tensor = Tensor.from_address(address)
    assert tensor.type == F32
    array = view(tensor, address, np.float32)
    return np.array(array, np.float32).reshape(-1, array.shape[-1])
