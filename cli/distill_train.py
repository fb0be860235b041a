"""`gguforge distill train`: a student by a recipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gguforge.cli.common import in_words, quiet_option

if TYPE_CHECKING:
    from gguforge.distill.footprint import Footprint
    from gguforge.distill.train import Trained

Tell = Callable[[str, int, dict[str, float]], None]


@click.command("train")
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="The folder for everything that is made.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@quiet_option
def command(recipe: str, output: str, as_json: bool, quiet: bool) -> None:
    """Train a student by RECIPE, a TOML file; see docs/recipes.md for all it can say.

    The student writes, as GPT-2 and Llama do, or is an encoder, as BERT is; examples/ has recipes for known pairs.

    Run the same command again to go on with a run that was stopped. With [blocks] in the recipe the student is trained
    on the blocks of a preset, and OUTPUT/model.gguf holds those very blocks. Several processes, on one machine or more,
    share the work under torchrun.

    \b
    Examples:
      gguforge distill train recipe.toml -o student/
      gguforge convert student/checkpoint -t Q4_K_M
      torchrun --no-python --nproc-per-node 2 gguforge distill train recipe.toml -o student/
    """
    from gguforge.distill.recipe import read_recipe
    from gguforge.distill.report import described
    from gguforge.distill.train import train_recipe

    read = read_recipe(recipe)
    quiet = quiet or os.environ.get("RANK", "0") != "0"

    def announce(parameters: int, memory: Footprint) -> None:
        if not quiet:
            line = f"{parameters:,} parameters; a process will need about {in_words(memory.total)}"
            click.echo(line, err=True)

    with _bar(read.schedule.steps, quiet) as tell:
        trained = train_recipe(read, output, tell, announce)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        click.echo(json.dumps({"output": output, **described(trained)}))
    elif not quiet:
        click.echo(report(trained, Path(output)))


@contextmanager
def _bar(steps: int, quiet: bool) -> Iterator[Tell]:
    """One bar a run on stderr with its loss; silent when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda name, step, losses: None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no watching thread
    with tqdm(total=steps, unit="step", leave=False) as bar:

        def tell(name: str, step: int, losses: dict[str, float]) -> None:
            if name != bar.desc.removesuffix(": "):
                bar.reset(steps)
                bar.set_description(name, refresh=False)
            bar.set_postfix_str(f"loss {losses['loss']:.4f}", refresh=False)
            bar.update(step - bar.n)

        yield tell


def report(trained: Trained, output: Path) -> str:
    """For people: what was won, and what to do with it."""
    from gguforge.distill.report import summary, verdict

    lines = summary(trained)
    run = next(iter(trained.runs.values()))
    if run.end is not None:
        lines.insert(0, f"{run.name}: {verdict(run.end)}")
    made = ["checkpoint"] + (["model.gguf"] if trained.recipe.blocks is not None else []) + ["report.html"]
    lines.append("wrote " + ", ".join(str(output / name) for name in made))
    if trained.recipe.blocks is not None:
        lines.append(f"chat with it: gguforge chat {output / 'model.gguf'}")
    return "\n".join(lines)
