"""How much memory training will need, before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOAT = 4  # bytes
BASE = 450 << 20  # bytes of a process with torch and transformers loaded


@dataclass(frozen=True)
class Footprint:
    """Bytes, by what they are for.

    Attributes:
        weights: of the student.
        optimizer: gradients and AdamW's two moments.
        blocks: masters and their lattice, where the student is held on blocks.
        teacher: weights in memory.
        activations: what the backward pass needs of one batch.
        scores: the logits of one batch, and the losses' copies.
        writing: keys and values and the last scores of what the student writes; freed before a batch is read.
    """

    weights: int
    optimizer: int
    blocks: int
    teacher: int
    activations: int
    scores: int
    writing: int = 0

    @property
    def total(self) -> int:
        """All together, with the process itself."""
        parts = self.weights, self.optimizer, self.blocks, self.teacher
        return BASE + sum(parts) + max(self.activations + self.scores, self.writing)


def footprint(
    parameters: int,
    config: Mapping[str, Any],
    tokens: int,
    *,
    teacher_parameters: int = 0,
    on_blocks: bool = False,
    bfloat16: bool = False,
    written: tuple[int, int] = (0, 0),
    scored: float = 1.0,
) -> Footprint:
    """Estimate the memory of one process.

    Args:
        parameters: of the student.
        config: its config.json.
        tokens: of one batch, padding included.
        teacher_parameters: of a teacher in memory, 0 for none.
        on_blocks: whether the student is held on blocks.
        bfloat16: whether the forward pass is computed in bfloat16.
        written: texts that the student writes at once, and tokens of each.
        scored: share of the tokens that a head is applied to.
    """
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers")
    hidden = _number(config, "hidden_size", "n_embd", "dim")
    ffn = _number(config, "intermediate_size", "n_inner", "hidden_dim") or 4 * hidden
    vocabulary = _number(config, "vocab_size")
    # a layer keeps, of each token: both norms' inputs and outputs, query, key, value, what attention gives, both
    # residual sums (about 12 of the hidden size), and gate, its activation, up and their product (4 of the other)
    size = 2 if bfloat16 else FLOAT
    kept = layers * (12 * hidden + 4 * ffn) * size
    copies = 5 if teacher_parameters else 3  # scores, their logarithms and gradient; the teacher's two
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    head = _number(config, "head_dim") or hidden // max(1, heads)
    cache = layers * 2 * head * (_number(config, "num_key_value_heads") or heads) * size
    texts, length = written
    return Footprint(
        weights=parameters * FLOAT,
        optimizer=3 * parameters * FLOAT,
        blocks=3 * parameters * FLOAT if on_blocks else 0,
        teacher=teacher_parameters * FLOAT,
        activations=tokens * kept,
        scores=int(scored * tokens) * vocabulary * FLOAT * copies,
        writing=texts * (2 * length * cache + 3 * vocabulary * FLOAT),  # a cache that grows is copied
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)
