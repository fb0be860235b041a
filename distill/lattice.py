"""One tensor on the blocks it will be stored in: the values that a file can hold, and how to stay on them.

A lattice is made from rows of weights by the encoder of `gguforge.quant`. Between two such refreshes the scales are
held: weights that moved take the nearest level of their group. The values are those that decoding gives, bit for bit,
because they are computed by the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.base import Block
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError
from gguforge.quant.plan import TensorPlan
from gguforge.quant.presets import UNQUANTIZED
from gguforge.quant.sources import Bytes, Floats

if TYPE_CHECKING:
    from torch import Tensor


def to_numpy(tensor: Tensor) -> Floats:
    """A tensor of any device as a float32 array."""
    array: Floats = tensor.detach().float().cpu().numpy()
    return array


def from_numpy(array: NDArray[Any], like: Tensor) -> Tensor:
    """An array as a tensor on the device of another one."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


class Lattice:
    """A tensor of a type whose scales cannot be held, such as IQ4_NL: it is encoded anew at every step.

    Args:
        tensor: its plan: type, and importance where there is an importance matrix.

    Attributes:
        blocks: what goes into the file, shape (rows, bytes per row), as of the last `refresh` or `snap`.
    """

    def __init__(self, tensor: TensorPlan) -> None:
        self.tensor = tensor
        self.kind: type[Block] = block_type(tensor.type)
        self.blocks: Bytes = np.empty((tensor.rows, tensor.row_bytes), np.uint8)

    def refresh(self, rows: Tensor) -> None:
        """New scales and levels, by the encoder, for rows of float32, shape (rows, row length).

        Raises:
            DataError: the weights are NaN, infinite, or too large for the type.
        """
        values = to_numpy(rows)
        if not np.isfinite(values).all():
            raise DataError("weights became NaN or infinite", tensor=self.tensor.name, remedy="Try a smaller rate.")
        importance = self.tensor.importance
        matrices = values.reshape(1 if importance is None else len(importance), -1, values.shape[-1])
        encoded = [
            self.kind.encode(matrix, None if importance is None else importance[i]) for i, matrix in enumerate(matrices)
        ]
        self.blocks = np.concatenate(encoded).reshape(self.blocks.shape)
        if not self.kind.is_finite(self.blocks):
            raise DataError(f"weights became too large for {self.tensor.type.name}", tensor=self.tensor.name)

    def snap(self, rows: Tensor) -> Tensor:
        """The values that stand for these rows in the file, in the same shape; `blocks` hold them from now on."""
        self.refresh(rows)
        return self.values(rows)

    def look(self, rows: Tensor) -> None:
        """Find out which weights are out of reach of their levels, without moving anything."""

    def within(self, gradient: Tensor) -> Tensor:
        """The gradient of the rows, without what would push weights further out of reach of their levels."""
        return gradient

    def values(self, like: Tensor) -> Tensor:
        """The blocks decoded, in the shape and on the device of `like`."""
        return from_numpy(self.kind.decode(self.blocks), like).view_as(like)

    def settle(self) -> None:
        """Bring `blocks` up to the last `snap`, where that was put off."""

    def state(self) -> dict[str, Any]:
        """What a later run needs to hold the same scales."""
        import torch

        self.settle()
        return {"blocks": torch.from_numpy(self.blocks.copy())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Hold the scales of what `state` gave."""
        self.blocks = state["blocks"].cpu().numpy().copy()


class FloatLattice(Lattice):
    """A tensor that stays F32, F16 or BF16: the values are the weights, rounded."""

    _values: Tensor | None = None

    def snap(self, rows: Tensor) -> Tensor:
        if self.tensor.type == T.F16:
            values = rows.half().float()
        elif self.tensor.type == T.BF16:
            values = rows.bfloat16().float()
        else:
            values = rows.float().clone()
        self._values = values
        return values

    def refresh(self, rows: Tensor) -> None:
        super().refresh(rows)
        self._values = None

    def settle(self) -> None:
        if self._values is not None:
            self.refresh(self._values)


class GroupedLattice(Lattice):
    """A tensor of evenly spaced levels: between refreshes its scales are held and its levels follow the weights."""

    kind: type[GroupedBlock]

    def __init__(self, tensor: TensorPlan) -> None:
        super().__init__(tensor)
        self._step: Tensor | None = None
        self._minimum: Tensor | None = None
        self._levels: Tensor | None = None
        self._beyond: Tensor | None = None

    def refresh(self, rows: Tensor) -> None:
        super().refresh(rows)
        self._forget()

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._forget()

    def _forget(self) -> None:
        """The blocks are new: nothing that was computed from the old ones holds."""
        self._step = self._minimum = self._levels = self._beyond = None

    def structured(self) -> NDArray[np.void]:
        """The blocks by their fields, shape (blocks,), sharing their memory."""
        return self.blocks.reshape(-1).view(self.kind.layout)

    def held(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and minimum of each group, shape (blocks, groups, 1), on the device of `like`."""
        if self._step is None:
            step, minimum = self.kind.steps(self.structured())
            self._step = from_numpy(step[..., None], like)
            self._minimum = None if minimum is None else from_numpy(minimum[..., None], like)
        return self._step, self._minimum

    def snap(self, rows: Tensor) -> Tensor:
        step, minimum = self.held(rows)
        self._levels = self._nearest(rows)
        values = step * self._levels  # of integers, as in the file: a level has no negative zero
        if minimum is not None:
            values -= minimum
        return values.view(rows.shape)

    def _nearest(self, rows: Tensor) -> Tensor:
        """The level nearest to each weight, int8, shape (blocks, groups, group)."""
        step, minimum = self.held(rows)
        wanted = rows.detach().float().reshape(len(step), -1, self.kind.group)
        if minimum is not None:
            wanted = wanted + minimum
        # a group of step 0 has one value only: any level stands for it
        wanted = (wanted / step.masked_fill(step == 0, 1)).round_()
        levels = wanted.clamp(self.kind.low, self.kind.high)
        self._beyond = wanted.sub_(levels).mul_(step).sign_().char()  # a negative step turns the direction around
        return levels.char()

    def look(self, rows: Tensor) -> None:
        self._nearest(rows)

    def within(self, gradient: Tensor) -> Tensor:
        if self._beyond is None:
            return gradient
        outwards = self._beyond.view(gradient.shape) * gradient < 0  # weights move against their gradient
        return gradient.masked_fill(outwards, 0)

    def settle(self) -> None:
        """Put the levels of the last `snap` into `blocks`; they are left on the device until they are wanted."""
        if self._levels is not None:
            levels = self._levels.cpu().numpy().reshape(-1, self.kind.size)
            self.kind.put_levels(levels, self.structured())
            self._levels = None


class ScaledLattice(GroupedLattice):
    """A tensor whose levels are frozen and whose scales learn: a factor for each block's `d`, one for its minimums.

    Attributes:
        factors: what the scales of the refresh are multiplied with, shape (1 or 2, blocks); these learn.
    """

    def begin(self, rows: Tensor) -> Tensor:
        """Encode the rows and return the factors, all 1."""
        import torch

        self.refresh(rows)
        fields = ["d", self.kind.offset] if self.kind.offset else ["d"]
        self.start = from_numpy(np.stack([self.structured()[name].astype(np.float32) for name in fields]), rows)
        self._freeze(rows)
        self.factors = torch.ones_like(self.start)
        return self.factors

    def _freeze(self, rows: Tensor) -> None:
        """Take the integers from the blocks: levels, and the scales of the groups."""
        blocks = self.structured()
        self.integers = [
            None if part is None else from_numpy(part.astype(np.float32), rows) for part in self.kind.scales(blocks)
        ]
        shape = len(blocks), -1, self.kind.group
        self.frozen = from_numpy(self.kind.levels(blocks), rows).view(shape)  # int8

    def scaled(self) -> Tensor:
        """The scales as the file stores them: half precision, shape (1 or 2, blocks), float32."""
        return (self.start * self.factors).half().float()

    def snap(self, rows: Tensor) -> Tensor:
        scales = self.scaled()
        step, minimum = self.integers
        values = (scales[0][:, None] * step)[..., None] * self.frozen
        if minimum is not None:
            values -= (scales[1][:, None] * minimum)[..., None]
        return values.view(rows.shape)

    def gradient(self, of_rows: Tensor) -> Tensor:
        """The gradient of the factors, from that of the values."""
        import torch

        groups = of_rows.float().reshape(self.frozen.shape)
        step, minimum = self.integers
        parts = [((groups * self.frozen).sum(-1) * step).sum(-1)]
        if minimum is not None:
            parts.append(-(groups.sum(-1) * minimum).sum(-1))
        return torch.stack(parts) * self.start

    def settle(self) -> None:
        blocks, scales = self.structured(), to_numpy(self.scaled())
        blocks["d"] = scales[0]
        if self.kind.offset:
            blocks[self.kind.offset] = scales[1]

    def state(self) -> dict[str, Any]:
        return super().state() | {"start": self.start.clone()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.start.copy_(state["start"])
        self._freeze(self.start)


def lattice_of(tensor: TensorPlan, scales_only: bool = False) -> Lattice:
    """The lattice of a tensor's type.

    Args:
        tensor: its plan.
        scales_only: freeze the levels and let the scales learn.

    Raises:
        InputError: the type has no encoder.
    """
    kind = block_type(tensor.type)
    if tensor.type in UNQUANTIZED:
        return FloatLattice(tensor)
    if issubclass(kind, GroupedBlock):
        return ScaledLattice(tensor) if scales_only else GroupedLattice(tensor)
    return Lattice(tensor)
