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
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguforge.convert.json_file import read_object
from gguforge.distill.footprint import Footprint, footprint
from gguforge.distill.grid import Grid, placements, plan_blocks
from gguforge.distill.identity import recipe_key
from gguforge.distill.measure import Measured
from gguforge.distill.processes import Group, processes
from gguforge.distill.recipe import BlocksPart, Losses, Recipe
from gguforge.distill.students import is_encoder, load
from gguforge.distill.trainer import History, Trainer
from gguforge.distill.workshop import Workshop, student_config
from gguforge.quant.errors import InputError
from gguforge.quant.files import replacing
from gguforge.quant.imatrix import read_imatrix
from gguforge.quant.quantize import Guide
from gguforge.quant.writer import write

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


def train_recipe(
    recipe: Recipe,
    output: str | os.PathLike[str],
    tell: Tell = lambda name, step, losses: None,
    announce: Announce = lambda parameters, memory: None,
    group: Group | None = None,
) -> Trained:
    """Train all that a recipe asks for, and write the results.

    Args:
        recipe: from `read_recipe`.
        output: the folder for everything; made if need be.
        tell: called after each step with the run's name, its step and its losses.
        announce: called before the first run with the student's parameters and the memory that a process will need;
            both are called in the first process alone.
        group: the processes, where they were joined already.

    Raises:
        GGUForgeError: an input cannot be used, the recipe changed since the folder's checkpoints were written, or
            training diverged.
    """
    if recipe.stages:
        raise InputError(f"the recipe has [{recipe.stages[0]}]", remedy="Follow it with: gguforge distill run")
    output = Path(output)
    joined = processes(recipe.hardware.device, recipe.hardware.threads) if group is None else nullcontext(group)
    with joined as group:
        shop = open_workshop(recipe, output, group)
        output.mkdir(parents=True, exist_ok=True)
        runs: dict[str, Run] = {}
        unquantized = None
        for seed in recipe.schedule.seeds:
            for kind, losses in _kinds(shop):
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


def open_workshop(recipe: Recipe, output: Path, group: Group) -> Workshop:
    """What a recipe's runs share, by what its student is."""
    config = student_config(recipe)
    if not config.is_file() or not is_encoder(read_object(config)):
        return Workshop(recipe, output, group)
    from gguforge.distill.encoders.workshop import EncoderWorkshop

    return EncoderWorkshop(recipe, output, group)


def _silent(name: str, step: int, losses: dict[str, float]) -> None:
    """What the other processes tell."""


def _kinds(shop: Workshop) -> Iterable[tuple[str, Losses]]:
    yield "student", shop.recipe.losses
    baseline = shop.baseline() if shop.recipe.report.baseline else None
    if baseline is not None:
        yield "baseline", baseline


def _run(shop: Workshop, name: str, seed: int, losses: Losses, student: Any, ships: bool, tell: Tell) -> Run:
    """Make one run, or go on with it; write the student if it is the one that ships."""
    recipe, group = shop.recipe, shop.group
    folder = shop.output / "runs" / name
    load("torch").manual_seed(seed)  # of dropout, whatever was drawn before
    grid = _grid(shop, recipe.blocks, student, folder) if recipe.blocks is not None else None
    start = shop.worth(student)
    trainer = Trainer(
        student,
        *shop.lessons(student, losses, seed),
        recipe.schedule,
        group,
        teacher=shop.teacher,
        grid=grid,
        bfloat16=recipe.hardware.precision == "bfloat16",
        folder=folder,
        key=f"{recipe_key(recipe)} {name}",
        held_out=(lambda: shop.held_out_loss(student)) if start is not None else None,
    )
    trainer.resume()
    history = trainer.train(lambda step, found: tell(name, step, found))
    if ships and group.first:
        shop.save(student, shop.output / "checkpoint")
        if grid is not None:
            write(grid.plan(), shop.output / "model.gguf", overwrite=True)
    return Run(name, seed, history, start, shop.worth(student))


def _grid(shop: Workshop, part: BlocksPart, student: Any, folder: Path) -> Grid:
    """Put a student on the blocks of its preset; the plan is that of its checkpoint, which is written for that."""
    source = folder / "begin"
    if shop.group.first and not (source / "config.json").is_file():
        shop.save(student, source)
    shop.group.wait()
    guide = None if part.imatrix is None else Guide.from_matrix(read_imatrix(part.imatrix), part.imatrix.name)
    plan = plan_blocks(source, part.preset, guide=guide)
    weights = dict(student.named_parameters())
    return Grid(weights, plan, placements(plan, source), part.refresh, part.scales_only)


def expected_memory(shop: Workshop, student: Any) -> Footprint:
    """What one process will need."""
    counts = [
        0 if model is None else sum(weight.numel() for weight in model.parameters())
        for model in (student, shop.teacher)
    ]
    return memory_of(shop.recipe, student.config.to_dict(), counts[0], counts[1], shop.context, shop.scored)


def memory_of(
    recipe: Recipe, config: Mapping[str, Any], parameters: int, teacher_parameters: int, context: int, scored: float
) -> Footprint:
    """What a process needs for a student with that config.json on documents of that many tokens; see `footprint`."""
    return footprint(
        parameters,
        config,
        recipe.schedule.batch * context,
        teacher_parameters=teacher_parameters,
        on_blocks=recipe.blocks is not None,
        bfloat16=recipe.hardware.precision == "bfloat16",
        written=_written(recipe),
        scored=scored,
    )


def _written(recipe: Recipe) -> tuple[int, int]:
    """How many texts the student writes at once, and of how many tokens at most, prompts included."""
    part, schedule = recipe.on_policy, recipe.schedule
    if part is None:
        return 0, 0
    steps = min(part.refresh, schedule.save)
    return math.ceil(part.share * steps * schedule.accumulate) * schedule.batch, part.prompt + part.tokens


def _write_report(trained: Trained, output: Path) -> None:
    from gguforge.distill.report import described, page

    for name, text in (
        ("report.json", json.dumps(described(trained), indent=2) + "\n"),
        ("report.html", page(trained)),
    ):
        data = text.encode()
        with replacing(output / name, len(data), overwrite=True) as part:
            part.write_bytes(data)
