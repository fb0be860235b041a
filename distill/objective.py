"""What one batch costs the student: the losses of a recipe, computed from both models' outputs and added up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguforge.distill import losses
from gguforge.distill.batches import Batch
from gguforge.distill.recipe import Losses
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

OF_STATES = ("hidden_mse", "hidden_cosine", "relation")
PROJECTIONS = re.compile(r".*\.(q_proj|k_proj|v_proj|query|key|value|q_lin|k_lin|v_lin|c_attn)")
"""Modules whose outputs are queries, keys, values, or (c_attn) all three side by side."""


@dataclass(frozen=True, eq=False)
class Output:
    """What a model makes of a batch.

    Attributes:
        scores: at the batch's places, shape (R, V); None for models without a head.
        states: of the last layer, shape (batch, length, width); None when they were not asked for.
        attention: the last layer's queries, keys and values, shape (batch, length, width) each; likewise.
    """

    scores: Tensor | None
    states: Tensor | None
    attention: tuple[Tensor, ...] | None = None


def run(model: Any, batch: Batch, states: bool = False, attention: bool = False) -> Output:
    """Read a batch from an empty context.

    Raises:
        InputError: the attention is asked for, and the model has no queries, keys and values known here.
    """
    mask = None if bool(batch.attention.all()) else batch.attention.long()
    with _listening(model if attention else None) as heard:
        out = model(input_ids=batch.input_ids, attention_mask=mask, output_hidden_states=states)
    logits = getattr(out, "logits", None)
    scores = None if logits is None else logits.flatten(0, 1)[batch.places]
    return Output(scores, out.hidden_states[-1] if states else None, tuple(heard) or None)


@contextmanager
def _listening(model: Any) -> Iterator[list[Tensor]]:
    """Within the block, what the last layer's projections give is collected; nothing without a model."""
    heard: list[Tensor] = []
    hooks = []
    if model is not None:
        found = [(name, module) for name, module in model.named_modules() if PROJECTIONS.fullmatch(name)]
        if not found:
            raise InputError("losses.attention_relation: the model's queries, keys and values were not found")
        last = found[-1:] if found[-1][0].endswith("c_attn") else found[-3:]

        def hear(module: Any, given: Any, out: Tensor) -> None:
            heard.extend(out.chunk(3, dim=-1) if len(last) == 1 else [out])

        hooks = [module.register_forward_hook(hear) for _, module in last]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


class Objective:
    """The losses of a recipe.

    Args:
        part: which, and how much of each.
        temperature: of the stored targets.
        causal: whether positions see only those before them.
    """

    def __init__(self, part: Losses, temperature: float = 1.0, causal: bool = True) -> None:
        self.part, self.temperature, self.causal = part, temperature, causal
        self.weights = part.weights()

    @property
    def wants_states(self) -> bool:
        """Whether the models' states are needed."""
        return any(name in OF_STATES for name in self.weights)

    @property
    def wants_attention(self) -> bool:
        """Whether the models' queries, keys and values are needed."""
        return "attention_relation" in self.weights

    def __call__(self, batch: Batch, student: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Every loss that counts, not weighted yet.

        Raises:
            InputError: the two models do not fit together, or a model lacks what a loss needs.
        """
        return {name: self._loss(name, batch, student, teacher) for name in self.weights}

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        terms = [self.weights[name] * value for name, value in parts.items()]
        return sum(terms[1:], terms[0])

    def _loss(self, name: str, batch: Batch, student: Output, teacher: Output | None) -> Tensor:
        if name == "attention_relation":
            assert student.attention is not None
            assert teacher is not None
            assert teacher.attention is not None
            pairs = zip(student.attention, teacher.attention, strict=True)
            return sum(self._relation(batch, ours, theirs) for ours, theirs in pairs) / len(student.attention)
        if name in OF_STATES:
            assert teacher is not None
            return self._of_states(name, batch, student.states, teacher.states)
        if student.scores is None:
            raise InputError(f"losses.{name} needs a student with a language model's head")
        if name == "cross_entropy":
            return losses.cross_entropy(student.scores, batch.tokens)
        if name == "sampled_kl":
            if batch.entries is None:
                raise InputError("the soft targets hold no entries")
            return losses.sampled_kl(student.scores, batch.entries, self.temperature)
        assert teacher is not None
        return self._online(name, *same_vocabulary(student.scores, teacher.scores))

    def _online(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        part = self.part
        t = part.temperature
        if name == "jensen_shannon":
            return losses.jensen_shannon(student, teacher, part.beta, t)
        if name in ("skew_kl", "reverse_skew_kl"):
            return losses.skew_kl(student, teacher, part.skew, name == "reverse_skew_kl", t)
        return {"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl}[name](student, teacher, t)

    def _of_states(self, name: str, batch: Batch, student: Any, teacher: Any) -> Tensor:
        if name == "relation":
            return self._relation(batch, student, teacher)
        if student.shape[-1] != teacher.shape[-1]:
            raise InputError(
                f"losses.{name} needs models of one width", expected=teacher.shape[-1], found=student.shape[-1],
                remedy="Use losses.relation, which does not.",
            )  # fmt: skip
        loss = losses.hidden_mse if name == "hidden_mse" else losses.hidden_cosine
        return loss(student[batch.attention].float(), teacher[batch.attention].float())

    def _relation(self, batch: Batch, student: Any, teacher: Any) -> Tensor:
        heads = self.part.relation_heads
        for side in (student, teacher):
            if side.shape[-1] % heads:
                raise InputError(
                    "losses.relation_heads", expected=f"a divisor of the width {side.shape[-1]}", found=heads
                )
        length = batch.attention.shape[1]
        visible = batch.attention[:, None, None, :] & batch.attention[:, None, :, None]
        if self.causal:
            visible = visible & visible.new_ones(length, length).tril()
        visible = visible | visible.new_ones(length).diag().bool()  # padding sees itself alone
        return losses.relation_kl(student, teacher, heads, visible)


def same_vocabulary(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both models' scores for the tokens that both have: some pad their vocabularies to rounder numbers."""
    assert teacher is not None
    shared = min(student.shape[-1], teacher.shape[-1])
    return student[:, :shared], teacher[:, :shared]
