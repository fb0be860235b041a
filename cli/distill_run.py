"""`gguforge distill run`: a recipe from the teacher to the files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.chunk_bar import ChunkBar
from gguforge.cli.common import in_words, quiet_option, table

if TYPE_CHECKING:
    from gguforge.distill.stages import Record, Stage, State


@click.command("run")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="The folder for everything that is made.")
@click.option("--dry-run", is_flag=True, help="Print the stages, their memory and what is done, and do nothing.")
@click.option("--redo", is_flag=True, help="Throw away text, targets and students that the recipe makes otherwise now.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@quiet_option
def command(recipe: str, output: str, dry_run: bool, redo: bool, as_json: bool, quiet: bool) -> None:
    """Follow RECIPE, a TOML file, from the teacher to GGUF files: one command for the whole way.

    As the recipe says, the teacher answers prompts, soft targets are collected, a student is trained, trained again on
    the blocks of a preset, converted, quantized and measured. See docs/recipes.md for all it can say.

    Run the same command again to go on with a run that was stopped, however it was stopped. What a changed recipe
    touches is made again; text, targets and students, which take long, only with --redo. Several processes share the
    training under torchrun.

    \b
    Examples:
      gguforge distill run recipe.toml -o student/
      gguforge distill run recipe.toml -o student/ --dry-run
      gguforge chat student/student-Q4_K_M.gguf
      torchrun --no-python --nproc-per-node 2 gguforge distill run recipe.toml -o student/
    """
    from gguforge.distill.recipe import read_recipe
    from gguforge.distill.run import follow, stages_of

    read, folder = read_recipe(recipe), Path(output)
    if dry_run:
        stages, state = stages_of(read, folder)
        click.echo(json.dumps(planned(stages, state)) if as_json else plan_table(stages, state))
        return
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    with Screen(quiet) as screen:
        report = follow(read, folder, screen.tell, screen.show, redo=redo)
    if report is None:  # a process that only helped
        return
    if as_json:
        click.echo(json.dumps(report))
    elif not quiet:
        click.echo("\n".join(report["summary"]))


class Screen:
    """What is shown on stderr: a line for every stage that is done, and bars meanwhile where stderr is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._label = quiet, ""
        self._bar = ChunkBar("", False)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, name: str, done: int, total: int, remark: str) -> None:
        """Move the bar of that name; the one before goes."""
        if name != self._label:
            self._bar.close()
            self._label, self._bar = name, ChunkBar(name, not self._quiet and sys.stderr.isatty(), unit="")
        self._bar(done, total, remark)

    def tell(self, name: str, record: Record, kept: bool) -> None:
        """A line for a stage that is done."""
        self._bar.close()
        self._label, self._bar = "", ChunkBar("", False)
        if not self._quiet:
            took = "done before" if kept else f"{record.seconds:.1f} s"
            click.echo(f"{name}: {record.facts.get('line', '')} ({took})", err=True)


def planned(stages: list[Stage], state: State) -> dict[str, list[dict[str, Any]]]:
    """What `--dry-run --json` prints."""
    return {
        "stages": [
            {
                "stage": stage.name,
                "standing": state.standing(stage),
                "memory_bytes": None if stage.memory is None else stage.memory(),
                "output": [str(path) for path in stage.outputs],
            }
            for stage in stages
        ]
    }


STANDING = {"new": "to do", "begun": "to go on", "done": "done", "changed": "changed: to do again"}
LOST = "changed: only with --redo"


def plan_table(stages: list[Stage], state: State) -> str:
    """What `--dry-run` prints."""
    rows = [["stage", "", "memory", "gives"]]
    for stage in stages:
        need = "" if stage.memory is None else in_words(stage.memory())
        standing = state.standing(stage)
        word = LOST if standing == "changed" and stage.costly else STANDING[standing]
        rows.append([stage.name, word, need, ", ".join(map(str, stage.outputs))])
    return table(rows, right=(2,))
