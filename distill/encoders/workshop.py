"""What the runs of an encoder's recipe share.

What the student is decides what it learns. A ...ForMaskedLM learns hidden words, alone or beside a teacher
(DistilBERT). A ...Model has no head: it learns its teacher's relations (MiniLM), states or sentence embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.convert.architectures.pooling import MODULES
from gguforge.convert.json_file import read_object
from gguforge.distill import students
from gguforge.distill.batches import Batch
from gguforge.distill.encoders.masking import EncoderReading, encoder_batch, has_head, scored
from gguforge.distill.encoders.measure import Array, compared, embeddings, objective_loss
from gguforge.distill.encoders.pooling import Pooling, read_pooling, write_pooling
from gguforge.distill.encoders.text import EncoderText, Words
from gguforge.distill.measure import Measured, measured_on
from gguforge.distill.objective import OF_EMBEDDINGS, Objective
from gguforge.distill.recipe import Losses
from gguforge.distill.workshop import Workshop, student_config
from gguforge.quant.errors import InputError

BATCH = 16  # held-out documents read at once, at most; relations between texts are within them
HELD_OUT = 0x68656C64  # hides the held-out words, always the same
COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions begin behind the padding's
UNKNOWN = Measured(0, *(math.nan,) * 5)


class EncoderWorkshop(Workshop):
    """Everything that the runs of an encoder's recipe share.

    Attributes:
        words: the vocabulary in which words are hidden; None for students without a head.
        pad: the token behind the shorter documents.
        poolings: of the student and of the teacher.
    """

    words: Words | None

    def _read(self) -> None:
        recipe, data = self.recipe, self.recipe.data
        weights = recipe.losses.weights()
        config = student_config(recipe)
        content = read_object(config)
        self._check(content, config)
        self.has_embeddings = any(name in OF_EMBEDDINGS for name in weights)
        self.poolings = self._poolings()
        text = EncoderText(self.home)
        if recipe.teacher.checkpoint not in (None, self.home):
            text.check_same(recipe.teacher.checkpoint)
        self.words, self.pad = (text.words() if has_head(content) else None), text.pad
        self.scored = scored(content)
        self.material = text.documents(data.text, data.context, lines=self.has_embeddings)
        self.held_out = []
        if data.held_out:
            self.held_out = text.documents(
                data.held_out, data.context, lines=self.has_embeddings, limit=data.held_out_documents
            )
        self.context = data.context

    def _check(self, content: Mapping[str, Any], config: Path) -> None:
        """That the recipe asks for nothing that encoders do not have."""
        recipe = self.recipe
        if recipe.data.targets is not None:
            raise InputError("soft targets are of models that predict the next token", path=recipe.data.targets)
        if recipe.losses.embedding_relation and recipe.schedule.batch < 2:
            raise InputError("losses.embedding_relation needs a schedule.batch of at least 2", path=config)
        if recipe.on_policy is not None:
            raise InputError("[on_policy] is for students that write; an encoder does not", path=config)
        of_scores = sorted(Objective(recipe.losses).of_scores)
        if of_scores and not has_head(content):
            raise InputError(
                f"losses.{of_scores[0]} needs a student with a head for hidden words", path=config,
                found=students.architecture(content), remedy="Name a ...ForMaskedLM there.",
            )  # fmt: skip
        for path in {config, (recipe.teacher.checkpoint or config.parent) / "config.json"}:
            places = longest(read_object(path)) if path.is_file() else None
            if places is not None and recipe.data.context > places:
                raise InputError("data.context", path=path, expected=f"at most {places}", found=recipe.data.context)

    def _poolings(self) -> tuple[Pooling, Pooling]:
        """The teacher's, and the student's own if its checkpoint has one."""
        part, folder = self.recipe.student, self.recipe.teacher.checkpoint
        teacher = Pooling.MEAN if folder is None else read_pooling(folder)
        if part.checkpoint is None or not (part.checkpoint / MODULES).is_file():
            return teacher, teacher
        return read_pooling(part.checkpoint), teacher

    def reading(self, seed: int) -> EncoderReading:
        """The order in which one seed's runs read, and what they hide."""
        schedule, group = self.recipe.schedule, self.group
        return EncoderReading(
            self.material, schedule.batch, schedule.accumulate, seed, group.number, group.count,
            pad=self.pad, words=self.words,
        )  # fmt: skip

    def objective(self, losses: Losses) -> Objective:
        """What a run is trained by."""
        return Objective(losses, self.temperature, causal=False, poolings=self.poolings)

    def baseline(self) -> Losses | None:
        """Hidden words alone, where the student has a head for them."""
        return super().baseline() if self.words is not None else None

    def _batches(self, words: Words | None) -> Iterator[Batch]:
        count = math.ceil(len(self.held_out) / BATCH)
        for number, places in enumerate(np.array_split(np.arange(len(self.held_out)), count)):
            some = [self.held_out[place] for place in places]
            yield encoder_batch(some, self.pad, self.group.device, words, (HELD_OUT, number))

    def worth(self, student: Any) -> Measured | None:
        """A student on the held-out text, where always the same words are hidden."""
        if not self.held_out:
            return None
        if self.words is not None:
            heads = self.teacher is not None and self.teacher.get_output_embeddings() is not None
            found = measured_on(student, self.teacher if heads else None, self._batches(self.words))
        else:
            loss = objective_loss(student, self.teacher, self._batches(None), self.objective(self.recipe.losses))
            found = replace(UNKNOWN, positions=len(self.held_out), loss=loss)
        if self.teacher is None:
            return found
        ours = embeddings(student, self._batches(None), self.poolings[0])
        beside = compared(ours, self._theirs)
        return replace(found, cosine=beside["cosine"], rank_correlation=beside["rank_correlation"])

    @cached_property
    def _theirs(self) -> Array:
        return embeddings(self.teacher, self._batches(None), self.poolings[1])

    def held_out_loss(self, student: Any) -> float:
        """What decides when to stop: the divergence from the teacher, or the cross-entropy; without a head the loss."""
        if self.words is not None:
            found = self.worth(student)
            assert found is not None
            return found.cross_entropy if math.isnan(found.divergence) else found.divergence
        losses = self.objective(self.recipe.losses)
        return objective_loss(student, self.teacher, self._batches(None), losses)

    def save(self, student: Any, folder: Path) -> None:
        """Write a student's checkpoint, with its pooling if embeddings were trained."""

        def add(part: Path) -> None:
            if self.has_embeddings:
                write_pooling(part, self.poolings[0], int(student.config.hidden_size))

        students.save_model(student, folder, self.home, add)


def longest(config: Mapping[str, Any]) -> int | None:
    """How many tokens an encoder can read at once; None where its config does not say.

    >>> longest({"max_position_embeddings": 512}), longest({"model_type": "roberta", "max_position_embeddings": 514})
    (512, 512)
    """
    places = config.get("max_position_embeddings")
    if not isinstance(places, int):
        return None
    unused = int(config.get("pad_token_id") or 1) + 1 if config.get("model_type") in COUNTED_FROM_PADDING else 0
    return places - unused
