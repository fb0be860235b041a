"""Follows a recipe from the teacher to the files: finds its stages, does what is not done, and writes the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gguforge.distill.making import Bar
from gguforge.distill.pipeline import Pipeline
from gguforge.distill.processes import Group, processes
from gguforge.distill.recipe import Recipe
from gguforge.distill.run_report import write_report
from gguforge.distill.stages import Stage, State, Tell, alone, run_stages


def follow(
    recipe: Recipe, output: str | os.PathLike[str], tell: Tell, bar: Bar, *, redo: bool = False
) -> dict[str, Any] | None:
    """Do all that a recipe asks for, or what is left of it.

    Args:
        recipe: from `read_recipe`.
        output: the folder for everything; made if need be.
        tell: called after each stage (see `run_stages`).
        bar: shows how far a stage is.
        redo: throw away what a changed recipe makes otherwise, even if it took long.

    Returns:
        The report as JSON takes it; None in the processes of torchrun that only helped.

    Raises:
        GGUForgeError: an input cannot be used, a stage failed, or the folder holds what may not be thrown away.
    """
    output = Path(output)
    stages_of(recipe, output)  # what is wrong is known before torch is loaded, and before a folder is made
    with processes(recipe.hardware.device, recipe.hardware.threads) as group:
        pipeline = Pipeline(recipe, output, group, bar)
        stages = pipeline.stages()
        if not group.first:
            run_stages(stages, None, group, tell)
            return None
        output.mkdir(parents=True, exist_ok=True)
        with alone(output):
            state = State(output)
            run_stages(stages, state, group, tell, redo=redo)
            return write_report(pipeline, stages, state)


def stages_of(recipe: Recipe, output: str | os.PathLike[str]) -> tuple[list[Stage], State]:
    """The stages of a recipe, and how far each is; nothing is done or written.

    Raises:
        GGUForgeError: as `follow`, as far as it can be known before.
    """
    folder = Path(output)
    pipeline = Pipeline(recipe, folder, Group(0, 1, None), lambda name, done, total, remark: None)
    return pipeline.stages(), State(folder)
