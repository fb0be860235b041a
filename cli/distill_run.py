"""`gguforge distill run`: a recipe from the teacher to the files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import in_words, quiet_option, table

if TYPE_CHECKING:
    from gguforge.distill.making import Bar
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
    with bars(quiet) as bar:
        report = follow(read, folder, silent if quiet else tell, bar, redo=redo)
    if report is None:  # a process that only helped
        return
    if as_json:
        click.echo(json.dumps(report))
    elif not quiet:
        click.echo("\n".join(report["summary"]))


def silent(name: str, record: Record, kept: bool) -> None:
    """Nothing for a stage that is done."""


def tell(name: str, record: Record, kept: bool) -> None:
    """A line for a stage that is done."""
    took = "done before" if kept else f"{record.seconds:.1f} s"
    click.echo(f"{name}: {record.facts.get('line', '')} ({took})", err=True)


@contextmanager
def bars(quiet: bool) -> Iterator[Bar]:
    """One bar after the other on stderr, each under its own name; none when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda name, done, total, remark: None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no watching thread
    with tqdm(unit="", unit_scale=True, leave=False) as bar:

        def show(name: str, done: int, total: int, remark: str) -> None:
            if name != bar.desc.removesuffix(": "):
                bar.reset(total)
                bar.set_description(name, refresh=False)
            bar.total = total
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)

        yield show


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


def plan_table(stages: list[Stage], state: State) -> str:
    """What `--dry-run` prints."""
    rows = [["stage", "", "memory", "gives"]]
    for stage in stages:
        need = "" if stage.memory is None else in_words(stage.memory())
        rows.append([stage.name, STANDING[state.standing(stage)], need, ", ".join(map(str, stage.outputs))])
    return table(rows, right=(2,))
