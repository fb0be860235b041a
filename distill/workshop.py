"""What all runs of a recipe share: text, tokenizer, teacher; and what depends on the kind of student.

This one is for students that predict the next token; `gguforge.distill.encoders.workshop` is for encoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguforge.convert.json_file import read_object
from gguforge.distill import students
from gguforge.distill.batches import Reading, make_batch, read_documents
from gguforge.distill.measure import Measured, measured
from gguforge.distill.objective import OF_EMBEDDINGS, Objective
from gguforge.distill.on_policy import OnPolicyObjective, OwnReading, Voice
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Losses, Recipe, StudentPart
from gguforge.distill.shards import Document
from gguforge.distill.targets import Targets, open_targets
from gguforge.distill.tokens import Tokenizer, identity_of
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ACTIVITY_BATCHES = 16  # batches of text on which channels are chosen
PROBED_TOKENS = 128  # a document's share of them


class Workshop:
    """Everything that the runs of a recipe share: text, tokenizer, teacher.

    Attributes:
        home: the folder whose tokenizer's files the student gets.
        material: the documents to train on.
        held_out: the documents to measure on.
        context: tokens of the longest document.
        teacher: in memory, or None.
        scored: share of the tokens that a head is applied to, at most.
    """

    material: Sequence[Document]
    held_out: Sequence[Document]
    context: int
    scored: float = 1.0

    def __init__(self, recipe: Recipe, output: Path, group: Group) -> None:
        self.recipe, self.output, self.group = recipe, output, group
        self.home = tokenizer_folder(recipe)
        self.temperature = 1.0
        self._read()
        self.teacher = self._teacher()

    def _read(self) -> None:
        """Read the text."""
        check_writer(self.recipe)
        data = self.recipe.data
        targets = None if data.targets is None else open_targets(data.targets)
        with Tokenizer.open(self.home) as tokenizer:
            if targets is not None:
                _check_targets(targets, tokenizer, self.home)
            self.material = targets if targets is not None else read_documents(data.text, tokenizer, data.context)
            self.voice = Voice(tokenizer.identity.tokens, tokenizer.ends()) if self.recipe.on_policy else None
            self.held_out = (
                read_documents(data.held_out, tokenizer, data.context, data.held_out_documents) if data.held_out else []
            )
        self.context = data.context
        if targets is not None:
            self.temperature, self.context = targets.manifest.temperature, targets.manifest.context

    def _teacher(self) -> Any:
        folder = self.recipe.teacher.checkpoint
        if folder is None or not (self.recipe.needs_teacher or self.held_out):
            return None
        return students.open_model(folder).to(self.group.device).eval().requires_grad_(False)

    def student(self, seed: int) -> Any:
        """The student before any training; the same for one seed."""
        part, teacher = self.recipe.student, self.recipe.teacher.checkpoint
        if part.checkpoint is not None:
            model = students.open_model(part.checkpoint)
        elif part.config is not None:
            model = students.fresh_model(read_object(part.config), part.config, seed)
        else:
            assert teacher is not None
            model = self._cut(part, teacher)
        return model.to(self.group.device)

    def _cut(self, part: StudentPart, folder: Path) -> Any:
        path = folder / "config.json"
        return students.cut(students.open_model(folder), read_object(path), part, path, self._probes())

    def _probes(self) -> Iterator[Tensor]:
        for number in range(min(ACTIVITY_BATCHES, len(self.material))):
            yield make_batch([self.material[number]]).input_ids[:, :PROBED_TOKENS]

    def reading(self, seed: int) -> Reading:
        """The order in which one seed's runs read."""
        schedule, group = self.recipe.schedule, self.group
        return Reading(self.material, schedule.batch, schedule.accumulate, seed, group.number, group.count)

    def objective(self, losses: Losses) -> Objective:
        """What a run is trained by."""
        return Objective(losses, self.temperature)

    def lessons(self, student: Any, losses: Losses, seed: int) -> tuple[Objective, Reading | OwnReading]:
        """What a run is trained by and what it reads; the baseline reads nothing of its own."""
        objective, reading, part = self.objective(losses), self.reading(seed), self.recipe.on_policy
        if part is None or losses is not self.recipe.losses:
            return objective, reading
        assert self.voice is not None
        half = self.recipe.hardware.precision == "bfloat16"
        own = OwnReading(
            reading, part, student, self.voice.beside(student, self.teacher), self.recipe.schedule.save, half
        )
        return OnPolicyObjective(losses, self.temperature, part), own

    def baseline(self) -> Losses | None:
        """What the same student learns by without a teacher; None where that is what the recipe does."""
        return None if set(self.recipe.losses.weights()) == {"cross_entropy"} else Losses(cross_entropy=1.0)

    def worth(self, student: Any) -> Measured | None:
        """A student on the held-out text; every process computes the same."""
        if not self.held_out:
            return None
        return measured(student, self.teacher, self.held_out, self.group.device)

    def held_out_loss(self, student: Any) -> float:
        """What decides when to stop: the divergence from the teacher where there is one, else the cross-entropy."""
        found = self.worth(student)
        assert found is not None
        return found.cross_entropy if self.teacher is None else found.divergence

    def save(self, student: Any, folder: Path) -> None:
        """Write a student's checkpoint."""
        students.save_model(student, folder, self.home)


def student_config(recipe: Recipe) -> Path:
    """The config.json that says what kind of student a recipe trains."""
    part = recipe.student
    folder = part.checkpoint or recipe.teacher.checkpoint
    path = part.config or (None if folder is None else folder / "config.json")
    assert path is not None  # the recipe was checked
    return path


def tokenizer_folder(recipe: Recipe) -> Path:
    """The folder with the tokenizer that the student gets."""
    part = recipe.student
    folder = part.tokenizer or part.checkpoint or recipe.teacher.checkpoint
    assert folder is not None  # the recipe was checked
    return folder


def check_writer(recipe: Recipe) -> None:
    """What a recipe for a student that predicts the next token has to keep to, as far as it can be known before work.

    Raises:
        InputError: a loss is of encoders, or a teacher cuts text into other tokens than the student, whose scores would
            then mean nothing to it.
        GGUForgeError: a tokenizer is missing or damaged.
    """
    for name in OF_EMBEDDINGS:
        if name in recipe.losses.weights():
            raise InputError(f"losses.{name} is for encoders", remedy="Use losses.hidden_cosine or losses.relation.")
    home, part = tokenizer_folder(recipe), recipe.collect
    named = [recipe.teacher.checkpoint, *(() if part is None else (*part.teachers, part.tokenizer))]
    for place in (Path(name) for name in named if name is not None and "://" not in str(name)):
        if place != home and identity_of(place).sha256 != identity_of(home).sha256:
            raise InputError(
                "the student's tokenizer is not its teacher's", path=home, expected=f"that of {place}",
                remedy="Take a student of the same family, or one from a config.",
            )  # fmt: skip


def _check_targets(targets: Targets, tokenizer: Tokenizer, home: Path) -> None:
    if not targets.manifest.tokenizer_sha256:
        raise InputError(
            "the soft targets do not say which tokenizer they were made with", path=targets.folder,
            remedy="Import them again, elsewhere, with --tokenizer.",
        )  # fmt: skip
    if targets.manifest.tokenizer_sha256 != tokenizer.identity.sha256:
        raise InputError(
            "the soft targets were made with another tokenizer", path=targets.folder,
            expected=f"that of {home}", remedy="Give the student its teacher's tokenizer.",
        )  # fmt: skip
