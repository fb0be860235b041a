"""What one batch costs the student: the losses of a recipe, computed from both models' outputs and added up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguforge.distill import losses
from gguforge.distill.batches import Batch
from gguforge.distill.encoders.pooling import Pooling, pooled
from gguforge.distill.recipe import Losses
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

OF_STATES = ("hidden_mse", "hidden_cosine", "relation")
OF_ATTENTION = "attention_relation"
OF_EMBEDDINGS = ("embedding_cosine", "embedding_relation")
FEW = 0.5  # share of a batch's positions below which the head is applied to those that count alone
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


def run(
    model: Any, batch: Batch, states: bool = False, attention: bool = False, *, scores: bool = True, layer: int = 0
) -> Output:
    """Read a batch from an empty context.

    Args:
        states, attention, scores: what is wanted; without scores the model's head is left out.
        layer: whose attention, counted from 1; 0 for the last.

    Raises:
        InputError: the attention is asked for, and the model has no queries, keys and values known here, or not so
            many layers.
    """
    mask = None if bool(batch.attention.all()) else batch.attention.long()
    with _listening(model if attention else None, layer) as heard, _selecting(model, batch) as selected:
        body = model if scores else _body(model)
        out = body(input_ids=batch.input_ids, attention_mask=mask, output_hidden_states=states)
    logits = getattr(out, "logits", None)
    found = None if logits is None else logits.flatten(0, 1)
    if found is not None and not selected:
        found = found[batch.places]
    return Output(found, out.hidden_states[-1] if states else None, tuple(heard) or None)


def _body(model: Any) -> Any:
    """A model of transformers without its head."""
    return getattr(model, "base_model", model)


@contextmanager
def _selecting(model: Any, batch: Batch) -> Iterator[bool]:
    """Within the block, the head sees the states at the batch's places alone, where those are few: whether it does."""
    body = _body(model)

    def select(module: Any, given: Any, out: Any) -> Any:
        out["last_hidden_state"] = out["last_hidden_state"].flatten(0, 1)[batch.places][None]
        return out

    if body is model or len(batch.places) >= FEW * batch.input_ids.numel():
        yield False
        return
    hook = body.register_forward_hook(select)
    try:
        yield True
    finally:
        hook.remove()


@contextmanager
def _listening(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """Within the block, what a layer's projections give is collected; nothing without a model."""
    heard: list[Tensor] = []
    listened = [] if model is None else _projections(model, layer)

    def hear(module: Any, given: Any, out: Tensor) -> None:
        heard.extend(out.chunk(3, dim=-1) if len(listened) == 1 else [out])

    hooks = [module.register_forward_hook(hear) for module in listened]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _projections(model: Any, layer: int) -> list[Any]:
    """The modules whose outputs are a layer's queries, keys and values."""
    found = [(name, module) for name, module in model.named_modules() if PROJECTIONS.fullmatch(name)]
    if not found:
        raise InputError("losses.attention_relation: the model's queries, keys and values were not found")
    each = 1 if found[0][0].endswith("c_attn") else 3
    count = len(found) // each
    if layer > count:
        raise InputError("losses.teacher_layer", expected=f"at most the teacher's {count}", found=layer)
    first = ((layer or count) - 1) * each
    return [module for _, module in found[first : first + each]]


class Objective:
    """The losses of a recipe.

    Args:
        part: which, and how much of each.
        temperature: of the stored targets.
        causal: whether positions see only those before them.
        poolings: how the student's and the teacher's states become a text's embedding.
    """

    def __init__(
        self,
        part: Losses,
        temperature: float = 1.0,
        causal: bool = True,
        poolings: tuple[Pooling, Pooling] = (Pooling.MEAN, Pooling.MEAN),
    ) -> None:
        self.part, self.temperature, self.causal, self.poolings = part, temperature, causal, poolings
        self.weights = part.weights()
        self.of_scores = self.weights.keys() - {*OF_STATES, *OF_EMBEDDINGS, OF_ATTENTION}

    def read(self, model: Any, batch: Batch, *, teacher: bool = False) -> Output:
        """What the losses need of a model; of a teacher the recipe may name the layer."""
        states = any(name in OF_STATES + OF_EMBEDDINGS for name in self.weights)
        layer = self.part.teacher_layer if teacher else 0
        attention = OF_ATTENTION in self.weights
        return run(model, batch, states, attention, scores=bool(self.of_scores), layer=layer)

    def wants_teacher(self, batch: Batch) -> bool:
        """Whether the teacher has to read a batch."""
        return self.part.needs_teacher

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
        if name == OF_ATTENTION:
            assert student.attention is not None
            assert teacher is not None
            assert teacher.attention is not None
            pairs = zip(student.attention, teacher.attention, strict=True)
            return sum(self._relation(batch, ours, theirs) for ours, theirs in pairs) / len(student.attention)
        if name in OF_STATES:
            assert teacher is not None
            return self._of_states(name, batch, student.states, teacher.states)
        if name in OF_EMBEDDINGS:
            assert teacher is not None
            return self._of_embeddings(name, batch, student.states, teacher.states)
        if student.scores is None:
            raise InputError(f"losses.{name} needs a student with a language model's head")
        if name == "cross_entropy":
            return losses.cross_entropy(student.scores, batch.tokens)
        if name == "sampled_kl":
            if batch.entries is None:
                raise InputError("the soft targets hold no entries")
            return losses.sampled_kl(student.scores, batch.entries, self.temperature)
        assert teacher is not None
        if teacher.scores is None:
            raise InputError(f"losses.{name} needs a teacher with such a head, too")
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
        _one_width(name, "relation", student, teacher)
        loss = losses.hidden_mse if name == "hidden_mse" else losses.hidden_cosine
        return loss(student[batch.attention].float(), teacher[batch.attention].float())

    def _of_embeddings(self, name: str, batch: Batch, student: Any, teacher: Any) -> Tensor:
        pairs = zip((student, teacher), self.poolings, strict=True)
        ours, theirs = (pooled(states.float(), batch.attention, pooling) for states, pooling in pairs)
        if name == "embedding_relation":
            return losses.embedding_relation(ours, theirs)
        _one_width(name, "embedding_relation", student, teacher)
        return losses.hidden_cosine(ours, theirs)

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


def _one_width(name: str, other: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"losses.{name} needs models of one width", expected=teacher.shape[-1], found=student.shape[-1],
            remedy=f"Use losses.{other}, which does not.",
        )  # fmt: skip


def same_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' scores for the tokens that both have: some pad their vocabularies to rounder numbers."""
    shared = min(student.shape[-1], teacher.shape[-1])
    return student[:, :shared], teacher[:, :shared]
