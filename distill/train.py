"""From a recipe to a trained student: its checkpoint, its GGUF file if it was trained on blocks, and what it is worth.

    out/runs/student-0/state.pt    a run's last checkpoint; one run for every seed, and one for its baseline
    out/checkpoint/                the student of the first seed, as a Hugging Face checkpoint
    out/model.gguf                 ... and its blocks, where the recipe has [blocks]
    out/report.json, report.html

Killed at any moment and started again it goes on: finished runs are not repeated. Under `torchrun` every process reads
other documents, and the first one writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguforge.convert.json_file import read_object
from gguforge.distill import students
from gguforge.distill.batches import Reading, make_batch, read_documents
from gguforge.distill.footprint import Footprint, footprint
from gguforge.distill.grid import Grid, placements, plan_blocks
from gguforge.distill.measure import Measured, measured
from gguforge.distill.objective import Objective
from gguforge.distill.processes import Group, processes
from gguforge.distill.recipe import BlocksPart, Losses, Recipe, StudentPart
from gguforge.distill.shards import Document
from gguforge.distill.targets import Targets, open_targets
from gguforge.distill.tokens import Tokenizer
from gguforge.distill.trainer import History, Trainer
from gguforge.quant.errors import InputError
from gguforge.quant.files import replacing
from gguforge.quant.imatrix import read_imatrix
from gguforge.quant.quantize import Guide
from gguforge.quant.writer import write

if TYPE_CHECKING:
    from torch import Tensor

ACTIVITY_BATCHES = 16  # batches of text on which channels are chosen
PROBED_TOKENS = 128  # a document's share of them

Tell = Callable[[str, int, dict[str, float]], None]
Announce = Callable[[int, Footprint], None]


@dataclass(frozen=True)
class Run:
    """One run: a seed, and whether it is trained by the recipe or by cross-entropy alone.

    Attributes:
        name: `student-0`, `baseline-0`.
        history: its losses.
        start, end: what it was worth before and after; None without held-out text.
    """

    name: str
    seed: int
    history: History
    start: Measured | None
    end: Measured | None


@dataclass(frozen=True)
class Trained:
    """What a recipe gave.

    Attributes:
        runs: by name.
        unquantized: the student before it was put on blocks; None without blocks or held-out text.
        memory: what one process was expected to need.
        parameters: of the student.
    """

    recipe: Recipe
    runs: dict[str, Run]
    unquantized: Measured | None
    memory: Footprint
    parameters: int


class Workshop:
    """Everything that the runs of a recipe share: text, tokenizer, teacher.

    Attributes:
        material: the documents to train on.
        held_out: the documents to measure on.
        teacher: in memory, or None.
    """

    def __init__(self, recipe: Recipe, output: Path, group: Group) -> None:
        self.recipe, self.output, self.group = recipe, output, group
        self.home = _tokenizer_folder(recipe)
        targets = None if recipe.data.targets is None else open_targets(recipe.data.targets)
        with Tokenizer.open(self.home) as tokenizer:
            if targets is not None:
                _check_targets(targets, tokenizer, self.home)
            self.material: Sequence[Document] = (
                targets if targets is not None else read_documents(recipe.data.text, tokenizer, recipe.data.context)
            )
            self.held_out = self._held_out(tokenizer)
        self.temperature = 1.0 if targets is None else targets.manifest.temperature
        self.context = recipe.data.context if targets is None else targets.manifest.context
        self.teacher = self._teacher()

    def _held_out(self, tokenizer: Tokenizer) -> list[Document]:
        data = self.recipe.data
        if not data.held_out:
            return []
        return read_documents(data.held_out, tokenizer, data.context, data.held_out_documents)

    def _teacher(self) -> Any:
        folder = self.recipe.teacher.checkpoint
        if folder is None or not (self.recipe.losses.needs_teacher or self.held_out):
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

    def worth(self, student: Any) -> Measured | None:
        """A student on the held-out text; every process computes the same."""
        if not self.held_out or student.get_output_embeddings() is None:
            return None
        return measured(student, self.teacher, self.held_out, self.group.device)


def _tokenizer_folder(recipe: Recipe) -> Path:
    part = recipe.student
    folder = part.tokenizer or part.checkpoint or recipe.teacher.checkpoint
    assert folder is not None  # the recipe was checked
    return folder


def _check_targets(targets: Targets, tokenizer: Tokenizer, home: Path) -> None:
    if targets.manifest.tokenizer_sha256 != tokenizer.identity.sha256:
        raise InputError(
            "the soft targets were made with another tokenizer", path=targets.folder,
            expected=f"that of {home}", remedy="Give the student its teacher's tokenizer.",
        )  # fmt: skip


def train_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str],
    tell: Tell = lambda name, step, losses: None,
    announce: Announce = lambda parameters, memory: None,
) -> Trained:
    """Train all that a recipe asks for, and write the results.

    Args:
        recipe: from `read_recipe`.
        output: the folder for everything; made if need be.
        tell: called after each step with the run's name, its step and its losses.
        announce: called before the first run with the student's parameters and the memory that a process will need;
            both are called in the first process alone.

    Raises:
        GGUForgeError: an input cannot be used, the recipe changed since the folder's checkpoints were written, or
            training diverged.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with processes(recipe.hardware.device, recipe.hardware.threads) as group:
        shop = Workshop(recipe, output, group)
        runs: dict[str, Run] = {}
        unquantized = None
        for seed in recipe.schedule.seeds:
            for kind, losses in _kinds(recipe):
                name = f"{kind}-{seed}"
                student = shop.student(seed)
                first = not runs
                if first:
                    memory = expected_memory(shop, student)
                    parameters = sum(weight.numel() for weight in student.parameters())
                    if group.first:
                        announce(parameters, memory)
                    unquantized = shop.worth(student) if recipe.blocks is not None else None
                runs[name] = _run(shop, name, seed, losses, student, first, tell if group.first else _silent)
        trained = Trained(recipe, runs, unquantized, memory, parameters)
        if group.first:
            _write_report(trained, output)
        group.wait()
    return trained


def _silent(name: str, step: int, losses: dict[str, float]) -> None:
    """What the other processes tell."""


def _kinds(recipe: Recipe) -> Iterable[tuple[str, Losses]]:
    yield "student", recipe.losses
    if recipe.report.baseline and set(recipe.losses.weights()) != {"cross_entropy"}:
        yield "baseline", Losses(cross_entropy=1.0)


def _run(shop: Workshop, name: str, seed: int, losses: Losses, student: Any, ships: bool, tell: Tell) -> Run:
    """Make one run, or go on with it; write the student if it is the one that ships."""
    recipe, group = shop.recipe, shop.group
    folder = shop.output / "runs" / name
    grid = _grid(shop, recipe.blocks, student, folder) if recipe.blocks is not None else None
    start = shop.worth(student)
    schedule = recipe.schedule
    reading = Reading(shop.material, schedule.batch, schedule.accumulate, seed, group.number, group.count)
    trainer = Trainer(
        student,
        Objective(losses, shop.temperature, _is_causal(student)),
        reading,
        schedule,
        group,
        teacher=shop.teacher if losses.needs_teacher else None,
        grid=grid,
        bfloat16=recipe.hardware.precision == "bfloat16",
        folder=folder,
        key=f"{recipe.key} {name}",
        held_out=(lambda: _held_out_loss(shop, student)) if start is not None else None,
    )
    trainer.resume()
    history = trainer.train(lambda step, found: tell(name, step, found))
    if ships and group.first:
        students.save_model(student, shop.output / "checkpoint", shop.home)
        if grid is not None:
            write(grid.plan(), shop.output / "model.gguf", overwrite=True)
    return Run(name, seed, history, start, shop.worth(student))


def _is_causal(model: Any) -> bool:
    """Whether positions see only those before them; encoders see all."""
    return "Causal" in type(model).__name__ or "LMHead" in type(model).__name__


def _held_out_loss(shop: Workshop, student: Any) -> float:
    """What decides when to stop: the divergence from the teacher where there is one, else the cross-entropy."""
    found = shop.worth(student)
    assert found is not None
    return found.cross_entropy if shop.teacher is None else found.divergence


def _grid(shop: Workshop, part: BlocksPart, student: Any, folder: Path) -> Grid:
    """Put a student on the blocks of its preset; the plan is that of its checkpoint, which is written for that."""
    source = folder / "begin"
    if shop.group.first and not (source / "config.json").is_file():
        students.save_model(student, source, shop.home)
    shop.group.wait()
    guide = None if part.imatrix is None else Guide.from_matrix(read_imatrix(part.imatrix), str(part.imatrix))
    plan = plan_blocks(source, part.preset, guide=guide)
    weights = dict(student.named_parameters())
    return Grid(weights, plan, placements(plan, source), part.refresh, part.scales_only)


def expected_memory(shop: Workshop, student: Any) -> Footprint:
    """What one process will need."""
    recipe = shop.recipe
    counts = [
        0 if model is None else sum(weight.numel() for weight in model.parameters())
        for model in (student, shop.teacher)
    ]
    return footprint(
        counts[0],
        student.config.to_dict(),
        recipe.schedule.batch * shop.context,
        teacher_parameters=counts[1],
        on_blocks=recipe.blocks is not None,
        bfloat16=recipe.hardware.precision == "bfloat16",
    )


def _write_report(trained: Trained, output: Path) -> None:
    from gguforge.distill.report import described, page

    for name, text in (
        ("report.json", json.dumps(described(trained), indent=2) + "\n"),
        ("report.html", page(trained)),
    ):
        data = text.encode()
        with replacing(output / name, len(data), overwrite=True) as part:
            part.write_bytes(data)
