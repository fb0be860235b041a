"""On-policy distillation: the student continues the text, and the teacher scores what it wrote.

Generalized knowledge distillation (GKD: arXiv:2306.13649). Of the batches that are read a share keeps only the
beginnings of its documents; the rest the student writes, and the loss there is a divergence from the teacher on the
student's own tokens. Nothing is learned through the draws themselves, only at the positions that they led to.

What is drawn is a function of the seed, the step, the process and the weights. Text for several steps may be written at
once, which costs little more than for one, since a step of writing waits for the weights and not for the arithmetic.
It is always written anew behind a checkpoint, so that a run that is taken up there has nothing to remember.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gguforge.distill.batches import Batch, Reading, make_batch, untaught
from gguforge.distill.objective import Objective, Output
from gguforge.distill.recipe import Losses, OnPolicyPart
from gguforge.distill.shards import Document, Ids
from gguforge.distill.trainer import evaluating

if TYPE_CHECKING:
    from torch import Tensor

OWN = 0x6F776E  # keeps these draws apart from those that order the documents


@dataclass(frozen=True)
class Voice:
    """What a student may write.

    Attributes:
        tokens: ids below are drawn; those above are padding of the vocabulary.
        ends: ids after which nothing is written; they belong to the text.
    """

    tokens: int
    ends: frozenset[int]

    def beside(self, *models: Any) -> Voice:
        """With only the tokens that all of these models know."""
        sizes = [model.get_input_embeddings().num_embeddings for model in models]
        return replace(self, tokens=min(self.tokens, *sizes))


def prompt_of(document: Document, tokens: int, draw: np.random.Generator) -> Ids:
    """What the student continues: the first tokens of a plain text, or a conversation up to one of its answers.

    Args:
        document: its scored stretches are the answers; of a plain text all but the first token is one stretch.
        tokens: of a plain text; at most half of it.
        draw: chooses the answer.
    """
    scored = np.asarray(document.loss_mask, bool)
    starts = np.flatnonzero(scored[1:] & ~scored[:-1]) + 1
    start = int(starts[draw.integers(len(starts))])
    if start == 1:
        start = max(1, min(tokens, len(document.input_ids) // 2))
    return document.input_ids[:start]


def side_by_side(prompts: Sequence[Ids], device: Any) -> tuple[Tensor, Tensor]:
    """Prompts that end together: ids, and 1 where there is no padding; shape (prompts, longest), int64."""
    import torch

    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    there = np.zeros_like(ids)
    for row, seen, prompt in zip(ids, there, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
        seen[len(row) - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(there).to(device)


def continuations(
    model: Any,
    prompts: Sequence[Ids],
    *,
    tokens: int,
    temperature: float,
    voice: Voice,
    generator: Any,
) -> list[Ids]:
    """What a model writes after each prompt, at least one token, with its KV cache.

    Args:
        prompts: token ids, at least one each.
        tokens: most that are written; an end token comes before that.
        temperature: of the draws.
        voice: what may be written.
        generator: torch's, on the model's device.
    """
    import torch

    ids, seen = side_by_side(prompts, generator.device)
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    last_alone = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    last_ones = torch.tensor(sorted(voice.ends), device=ids.device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    cache, columns = None, []
    for _ in range(tokens):
        out = model(
            input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True, **last_alone
        )
        cache = out.past_key_values
        chances = (out.logits[:, -1, : voice.tokens].float() / temperature).softmax(-1)
        ids = torch.multinomial(chances, 1, generator=generator)
        columns.append(ids[:, 0].masked_fill(~running, -1))
        running = running & ~torch.isin(ids[:, 0], last_ones)
        if not bool(running.any()):
            break
        seen = torch.cat([seen, seen.new_ones(len(prompts), 1)], 1)
        places = places[:, -1:] + 1
    written = torch.stack(columns, 1).cpu().numpy().astype(np.int32)
    return [row[row >= 0] for row in written]


@dataclass(frozen=True, eq=False)
class OwnBatch(Batch):
    """A batch of what the student wrote.

    Attributes:
        stands_for: scored tokens of the batch that it replaces, as many as it counts for.
    """

    stands_for: int

    @property
    def size(self) -> int:
        return self.stands_for


@dataclass(frozen=True, eq=False)
class OwnReading:
    """A reading of which the student writes a share.

    Attributes:
        reading: the order of the documents.
        part: how much is written, and how.
        student: as it is when it writes.
        voice: what it may say.
        save: steps between two checkpoints.
        bfloat16: compute in bfloat16.
    """

    reading: Reading
    part: OnPolicyPart
    student: Any
    voice: Voice
    save: int
    bfloat16: bool = False

    @property
    def accumulate(self) -> int:
        """Batches of a step."""
        return self.reading.accumulate

    def writes(self, step: int, number: int) -> bool:
        """Whether the student writes batch `number` of a step; evenly spread, and the same in every process."""
        place = step * self.accumulate + number
        return int((place + 1) * self.part.share) > int(place * self.part.share)

    def made(self, step: int, device: Any) -> Iterator[Batch]:
        """The batches of a step; what the student writes is from this step's weights or those of a few steps before."""
        kept: dict[tuple[int, int], list[Document]] = self.__dict__.setdefault("_kept", {})
        for number, chosen in enumerate(self.reading.batches(step)):
            if not self.writes(step, number):
                yield make_batch(chosen, device)
                continue
            if (step, number) not in kept:
                kept.clear()
                kept.update(self._write(step, device))
            size = sum(len(document.positions) for document in chosen)
            yield OwnBatch(**vars(make_batch(kept[step, number], device)), stands_for=size)

    def _write(self, step: int, device: Any) -> dict[tuple[int, int], list[Document]]:
        """Write all of the student's batches up to the next refresh or checkpoint, by step and number."""
        import torch

        last = min((step // every + 1) * every for every in (self.part.refresh, self.save))
        everything = [(one, number) for one in range(step, last) for number in range(self.accumulate)]
        places = [place for place in everything if self.writes(*place)]
        draw = np.random.default_rng([self.reading.seed, step, self.reading.process, OWN])
        prompts = [
            prompt_of(document, self.part.prompt, draw)
            for one, number in places
            for document in self.reading.batches(one)[number]
        ]
        generator = torch.Generator(device).manual_seed(int(draw.integers(1 << 62)))
        with evaluating(self.student), torch.autocast(torch.device(device).type, torch.bfloat16, self.bfloat16):
            written = continuations(
                self.student, prompts, tokens=self.part.tokens, temperature=self.part.temperature,
                voice=self.voice, generator=generator,
            )  # fmt: skip
        documents = [_joined(*pair) for pair in zip(prompts, written, strict=True)]
        size = self.reading.batch
        return {place: documents[i * size : (i + 1) * size] for i, place in enumerate(places)}


def _joined(prompt: Ids, written: Ids) -> Document:
    """A document of which only what was written counts."""
    ids = np.concatenate([prompt, written])
    return untaught(ids, np.arange(len(ids)) >= len(prompt))


class OnPolicyObjective(Objective):
    """The losses of a recipe, and on the student's own text one divergence from the teacher.

    Args:
        part: the losses on the data.
        temperature: of the stored targets.
        own: which divergence; the settings are those of `part`.
    """

    NAME = "on_policy"

    def __init__(self, part: Losses, temperature: float, own: OnPolicyPart) -> None:
        super().__init__(part, temperature)
        none = dict.fromkeys(part.weights(), 0.0)
        self.own = Objective(replace(part, **{**none, own.loss: 1.0}))  # type: ignore[arg-type]

    def __call__(self, batch: Batch, student: Output, teacher: Output | None) -> dict[str, Tensor]:
        if isinstance(batch, OwnBatch):
            return {self.NAME: self.own.total(self.own(batch, student, teacher))}
        return super().__call__(batch, student, teacher)

    def wants_teacher(self, batch: Batch) -> bool:
        return isinstance(batch, OwnBatch) or super().wants_teacher(batch)

    def read(self, model: Any, batch: Batch, *, teacher: bool = False) -> Output:
        if isinstance(batch, OwnBatch):
            return self.own.read(model, batch, teacher=teacher)
        return super().read(model, batch, teacher=teacher)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        return parts[self.NAME] if self.NAME in parts else super().total(parts)
