"""How the inputs of a block's matrices go together, in the model as it is and in the model as it is becoming.

For the matrices of one stage: E[x x^T] of the inputs x that they will have among quantized neighbours, and what their
outputs would have to change by for the unquantized model's outputs to come about: E[(wanted - present) x^T]. Where the
output is added to the residual stream, the sum is what is wanted, so errors from further up are made good as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.runtime.blocks import BlockRunner, States
from gguforge.runtime.forward import Tokens
from gguforge.runtime.probe import Stage

Floats = NDArray[np.float32]
Inputs = Tokens | States


@dataclass(frozen=True, eq=False)
class StageMoments:
    """What is known of one stage's inputs, means over all tokens.

    Attributes:
        inputs: E[x x^T], shape (columns, columns).
        drift: E[(x of the unquantized model - x) x^T], same shape; None when both are the same.
        missing: E[(wanted sum - present sum) x^T] of the matrices whose sums were read, shape (rows, columns) each.
    """

    inputs: Floats
    drift: Floats | None
    missing: Mapping[str, Floats]

    def shift(self, name: str, weights: Floats) -> Floats | None:
        """E[(wanted - present output) x^T] of a matrix, shape (rows, columns); None for no change."""
        if name in self.missing:
            return self.missing[name]
        return None if self.drift is None else weights @ self.drift


def collect(
    stage: Stage,
    pairs: Iterator[tuple[Inputs, Inputs]],
    exact: BlockRunner,
    present: BlockRunner | None,
    after_chunk: Callable[[], None],
) -> StageMoments:
    """Read all chunks through a block.

    Args:
        stage: its matrices.
        pairs: inputs of the block, chunk by chunk, in the unquantized model and in the present one.
        exact: the block with its own weights.
        present: the block as far as it is quantized, this stage's matrices still unquantized; None to collect in the
            unquantized model alone.
        after_chunk: called after each.
    """
    tokens, inputs, drift = 0, _Total(), _Total()
    missing = {name: _Total() for name in stage.summed}
    for theirs, ours in pairs:
        wanted = exact.run(theirs, stage)
        found = wanted if present is None else present.run(ours, stage)
        assert found.inputs is not None
        assert wanted.inputs is not None
        x = found.inputs
        inputs.add(x, x)
        if present is not None:
            if len(missing) < len(stage.names):
                drift.add(wanted.inputs - x, x)
            for name, total in missing.items():
                total.add(wanted.sums[name] - found.sums[name], x)
        tokens += len(x)
        after_chunk()
    sums = {name: total.mean(tokens) for name, total in missing.items() if total.value is not None}
    mean = inputs.mean(tokens)
    return StageMoments(mean, None if drift.value is None else drift.mean(tokens), sums)


class _Total:
    """A sum of products of two arrays, shapes (tokens, a) and (tokens, b): (a, b)."""

    def __init__(self) -> None:
        self.value: Floats | None = None

    def add(self, one: Floats, other: Floats) -> None:
        product: Floats = one.T @ other
        self.value = product if self.value is None else np.add(self.value, product, out=self.value)

    def mean(self, count: int) -> Floats:
        assert self.value is not None
        return self.value / np.float32(count)
