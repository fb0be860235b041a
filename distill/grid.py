"""Trains a model on the very blocks that it will ship in.

The model's parameters always hold values that the file can hold: those of the blocks of a plan, the same plan that
`quantize` would execute. Beside each parameter lives a master of full precision. A step computes the gradient at the
values of the blocks, applies it to the masters (the straight-through estimator: Bengio et al. 2013, arXiv:1308.3432)
and moves the parameters to the blocks nearest to the masters. Nothing is rounded at the end: what the last step
computed with is what is written.

    grid = Grid(dict(model.named_parameters()), placements(folder, "Q4_K_M"), plan)
    for batch in batches:
        loss(model, batch).backward()
        grid.pull()               # gradients to the masters
        optimizer.step()          # an optimizer over grid.masters
        grid.push()               # masters to blocks to parameters
    write(grid.plan(), "model.gguf")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguforge.convert.checkpoint import read_checkpoint
from gguforge.convert.conversion import plan as plan_checkpoint
from gguforge.convert.operations import CastToFloat, PermuteHeads, Rearranged, SkipRows, Transpose
from gguforge.distill.lattice import Lattice, ScaledLattice, from_numpy, lattice_of
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quantize import Guide, retype
from gguforge.quant.rules import Overrides
from gguforge.quant.sources import ArraySource, Bytes, FileSource, Source

if TYPE_CHECKING:
    from torch import Tensor

REFRESH = 50  # steps between two searches for scales


@dataclass(frozen=True, eq=False)
class BlockSource(Source):
    """A tensor whose blocks are in memory, shape (rows, bytes per row)."""

    blocks: Bytes
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    def raw_rows(self, start: int, stop: int) -> Bytes:
        return self.blocks[start:stop]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a parameter of the model goes in the file.

    Attributes:
        parameter: its name in the checkpoint.
        tensor: its plan: name in the file, type, importance.
        order: for each row of the tensor, the row of the parameter (rows are the first axis); None for the same order.
        transposed: the tensor's rows are the parameter's columns, as in GPT-2's `Conv1D`.
        skip: leading rows of the parameter that the file does not have; training leaves them.
    """

    parameter: str
    tensor: TensorPlan
    order: NDArray[np.int64] | None = None
    transposed: bool = False
    skip: int = 0

    def view(self, values: Tensor) -> Tensor:
        """The part of the parameter's values that the file has, its rows along the first axis, in their memory."""
        values = values[self.skip :] if self.skip else values
        return values.T if self.transposed else values


def plan_blocks(
    checkpoint: str | os.PathLike[str], preset: str, overrides: Overrides | None = None, guide: Guide | None = None
) -> Plan:
    """The plan of a checkpoint's file under a preset: what `convert` and then `quantize` would write.

    Raises:
        GGUForgeError: see `gguforge.convert.plan` and `gguforge.quant.quantize.retype`.
    """
    return retype(plan_checkpoint(checkpoint), preset, overrides=overrides, guide=guide)


def placements(plan: Plan, checkpoint: str | os.PathLike[str]) -> list[Placement]:
    """Which parameter every tensor of the plan is made from; tensors generated from the config have none.

    Raises:
        InputError: a tensor is made by an operation that is not undone here.
    """
    stored = read_checkpoint(Path(checkpoint)).tensors.values()
    names = {(tensor.path, tensor.offset): tensor.name for tensor in stored}
    found = []
    for tensor in plan.tensors:
        source = tensor.source
        moved: dict[str, Any] = {}
        if isinstance(source, ArraySource):
            continue
        if isinstance(source, PermuteHeads):
            moved["order"] = source.stored_rows(0, source.shape[0])
        elif isinstance(source, Transpose):
            moved["transposed"] = True
        elif isinstance(source, SkipRows):
            moved["skip"] = source.count
        if moved:
            assert isinstance(source, Rearranged)
            source = source.base
        if not isinstance(source, FileSource | CastToFloat):
            raise InputError(
                f"{type(source).__name__} cannot be undone in training", path=checkpoint, tensor=tensor.name,
                remedy="Train without blocks and quantize afterwards.",
            )  # fmt: skip
        found.append(Placement(names[source.path, source.offset], tensor, **moved))
    return found


class Weight:
    """One parameter, its master, and the lattice between them."""

    def __init__(self, parameter: Tensor, place: Placement, scales_only: bool) -> None:
        self.parameter, self.place = parameter, place
        self.lattice: Lattice = lattice_of(place.tensor, scales_only)
        self.order = self.inverse = None
        if place.order is not None:
            self.order = from_numpy(place.order, parameter)
            self.inverse = from_numpy(np.argsort(place.order), parameter)
        self.master: Tensor = parameter.detach().float().clone()
        if isinstance(self.lattice, ScaledLattice):
            self.master = self.lattice.begin(self.rows(self.master))

    @property
    def has_factors(self) -> bool:
        """Whether its scales learn, and not its weights."""
        return isinstance(self.lattice, ScaledLattice)

    def rows(self, values: Tensor) -> Tensor:
        """Values in the parameter's order and shape, as rows of the tensor."""
        values = self.place.view(values)
        if self.order is not None:
            values = values[self.order]
        return values.reshape(-1, self.place.tensor.row_length)

    def put(self, rows: Tensor, values: Tensor) -> None:
        """The other way: rows of the tensor into values in the parameter's order and shape."""
        there = self.place.view(values)
        rows = rows.reshape(there.shape)
        there.copy_(rows if self.inverse is None else rows[self.inverse])

    def pull(self) -> None:
        """The parameter's gradient becomes the master's."""
        gradient = self.parameter.grad
        if gradient is not None:
            rows = self.rows(gradient)
            if isinstance(self.lattice, ScaledLattice):
                gradient = self.lattice.gradient(rows)
            else:
                self.put(self.lattice.within(rows), gradient)
        self.master.grad = gradient
        self.parameter.grad = None

    def push(self) -> None:
        """The parameter takes the values nearest to the master."""
        rows = self.parameter.detach() if self.has_factors else self.master
        self.put(self.lattice.snap(self.rows(rows)), self.parameter.detach())

    def refresh(self) -> None:
        """The parameter takes the values that the encoder chooses for the master, scales included."""
        if self.has_factors:
            self.push()
        else:
            self.lattice.refresh(self.rows(self.master))
            self.read_blocks()

    def read_blocks(self) -> None:
        """The parameter takes the values of the blocks, which the master is held to from now on."""
        if not self.has_factors:
            self.lattice.look(self.rows(self.master))
        self.put(self.lattice.values(self.rows(self.parameter.detach())), self.parameter.detach())


class Grid:
    """All parameters of a model, held on the blocks of a plan.

    Args:
        parameters: the model's parameters by name; those of the plan take the values of its blocks at once.
        plan: from `plan_blocks`.
        places: from `placements`.
        refresh: steps between two searches for scales; in between they are held.
        scales_only: levels are frozen as the encoder chose them, and the scales learn.

    Raises:
        InputError: a parameter of the plan is not in the model, or a type has no encoder.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        places: Sequence[Placement],
        refresh: int = REFRESH,
        scales_only: bool = False,
    ) -> None:
        self._plan, self.refresh_every, self.steps = plan, refresh, 0
        missing = next((place.parameter for place in places if place.parameter not in parameters), None)
        if missing is not None:
            raise InputError(f"the model has no parameter {missing!r}", remedy="Give the checkpoint of this model.")
        self.weights = [Weight(parameters[place.parameter], place, scales_only) for place in places]
        self.learning = [weight for weight in self.weights if not scales_only or weight.has_factors]
        for weight in self.weights:
            weight.refresh()

    @property
    def masters(self) -> list[Tensor]:
        """What the optimizer moves: weights of full precision, or factors of scales."""
        return [weight.master for weight in self.learning]

    def pull(self) -> None:
        """After the backward pass: the masters take over the gradients."""
        for weight in self.weights:
            weight.pull()

    def push(self) -> None:
        """After the optimizer's step: the parameters follow the masters on their blocks.

        Raises:
            DataError: weights became NaN, infinite, or too large for their type.
        """
        self.steps += 1
        for weight in self.learning:
            if self.steps % self.refresh_every:
                weight.push()
            else:
                weight.refresh()

    def plan(self) -> Plan:
        """The plan of the file with the blocks as they are; writing it copies them."""
        blocks = {}
        for weight in self.weights:
            weight.lattice.settle()
            tensor = weight.place.tensor
            blocks[tensor.name] = BlockSource(weight.lattice.blocks, tensor.shape, tensor.type)
        tensors = [
            replace(tensor, source=blocks[tensor.name], importance=None) if tensor.name in blocks else tensor
            for tensor in self._plan.tensors
        ]
        return Plan(self._plan.metadata, tuple(tensors), self._plan.alignment)

    def state(self) -> dict[str, Any]:
        """Everything that training needs to go on as if it had never stopped."""
        weights = {
            weight.place.parameter: {"master": weight.master.clone(), **weight.lattice.state()}
            for weight in self.weights
        }
        return {"steps": self.steps, "weights": weights}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; of the same model and plan."""
        self.steps = state["steps"]
        for weight in self.weights:
            found = state["weights"][weight.place.parameter]
            weight.master.copy_(found["master"])
            weight.lattice.load_state(found)
            weight.read_blocks()
