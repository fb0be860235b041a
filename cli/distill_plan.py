"""`gguforge distill plan`: a student for a machine, from its measured memory and speed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import gathered, in_words, quiet_option, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gguforge.distill.planning.proposal import Material
    from gguforge.distill.planning.search import Candidate, Limits, Planner, Say
    from gguforge.distill.planning.shapes import Shape
    from gguforge.runtime.pace import Pace


@dataclass(frozen=True)
class Machine:
    """The machine that will run the student.

    Attributes:
        memory: bytes in words; None for what is free here.
        speed: tokens a second that are wanted.
        context, cache_type: of the run.
        preset: of the weights.
        threads: None for the physical cores.
        speed_of: a file that `--measure` wrote there.
    """

    memory: str | None
    speed: float | None
    context: int
    cache_type: str
    preset: str
    threads: int | None
    speed_of: str | None

    @property
    def cores(self) -> int:
        """Threads that compute."""
        from gguforge.runtime.machine import physical_cores

        return self.threads or physical_cores()

    def limits(self) -> Limits:
        """What the student must keep to.

        Raises:
            InputError: a size or a type is none, or nobody knows how much memory is free here.
        """
        from gguforge.distill.planning.search import Limits
        from gguforge.quant.errors import InputError
        from gguforge.quant.presets import find_preset
        from gguforge.quant.splits import parse_size
        from gguforge.runtime.machine import available_memory
        from gguforge.runtime.memory import CACHE_TYPES

        memory = available_memory() if self.memory is None else parse_size(self.memory)
        if memory is None:
            raise InputError("how much memory is free here is unknown", remedy="Give --memory.")
        if self.cache_type not in CACHE_TYPES:
            raise InputError(f"unknown cache type {self.cache_type!r}", remedy=f"Known: {', '.join(CACHE_TYPES)}.")
        return Limits(memory, self.speed, self.context, self.cache_type, find_preset(self.preset).name)


machine_options = gathered(
    Machine,
    "machine",
    click.option("--memory", metavar="SIZE", help="Memory for all that it needs: 2GB. [default: free here]"),
    click.option("--speed", type=click.FloatRange(min=0, min_open=True), help="Tokens a second that it must write."),
    click.option(
        "--ctx", "context", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of context."
    ),
    click.option("--cache-type", default="f16", show_default=True, help="Type of the KV cache."),
    click.option("-t", "--type", "preset", default="Q4_K_M", show_default=True, help="Preset of its weights."),
    click.option("--threads", type=click.IntRange(1), help="Threads that it runs on. [default: physical cores]"),
    click.option("--speed-of", type=click.Path(), help="The machine's speed from a file that --measure wrote on it."),
)


@click.command("plan")
@machine_options
@click.option("--teacher", type=click.Path(), help="A checkpoint or a GGUF file. [default: a Llama that is new]")
@click.option("--budget", metavar="TRAINING", help="Hours of training here, or tokens: 12h, 500M.")
@click.option("--from", "start", type=click.Choice(["cut", "scratch"]), help="Cut it from the teacher, or begin anew.")
@click.option("-f", "--text", multiple=True, type=click.Path(), help="Text for the recipe; may be repeated.")
@click.option("--held-out", multiple=True, type=click.Path(), help="Text that the recipe only measures on.")
@click.option("--tokenizer", type=click.Path(), help="Folder with the tokenizer's files, for a GGUF teacher's student.")
@click.option("--measure", is_flag=True, help="Only measure this machine's speed, for --speed-of elsewhere.")
@click.option("-o", "--output", type=click.Path(), help="The recipe to write; with --measure the measurement.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the students as JSON.")
@quiet_option
def command(
    machine: Machine, teacher: str | None, budget: str | None, start: str | None, text: tuple[str, ...],
    held_out: tuple[str, ...], tokenizer: str | None, measure: bool, output: str | None, overwrite: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Propose the most capable student that a machine can run, and a recipe for it.

    Sizes are exact, memory is what llama.cpp itself counts in a dry run, and speed is measured with models of random
    weights; the choice is run as well. A student is cut from a teacher's checkpoint where it can be, which takes a
    fraction of the training; otherwise it is new, of the teacher's family and with its tokenizer.

    \b
    Examples:
      gguforge distill plan --memory 2GB --speed 30 --teacher teacher/ -f text.txt -o recipe.toml
      gguforge distill plan --measure -o laptop.json         (on the laptop)
      gguforge distill plan --memory 4GB --speed 20 --speed-of laptop.json --teacher teacher/
    """
    from gguforge.distill.planning.cost import Budget, read_budget
    from gguforge.distill.planning.family import family_of
    from gguforge.distill.planning.proposal import Material
    from gguforge.distill.planning.search import Planner
    from gguforge.quant.files import check_target

    if measure and output is None:
        raise click.UsageError("--measure needs -o for its result.")
    if output is not None and not measure and not text:
        raise click.UsageError("A recipe needs a text to train on: -f.")
    if output is not None:
        check_target(Path(output), overwrite)

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    family = family_of(None if teacher is None else Path(teacher))
    planner = Planner(family, machine.limits(), Budget() if measure else read_budget(budget))
    if measure:
        assert output is not None
        _measure(planner, machine, Path(output), overwrite, say)
        return
    material = Material([*map(Path, text)], [*map(Path, held_out)], None if tokenizer is None else Path(tokenizer))
    if output is not None:
        material.check(family)
    students = _students(planner, machine, start, say)
    planner.budget = planner.budget.with_speed()
    click.echo(_json(planner, students) if as_json else _table(planner, students))
    if output is not None:
        made = _write(planner, students[0], Path(output), material, overwrite)
        say(f"wrote {' and '.join(map(str, made))}; follow it with: gguforge distill run {output} -o student/")


def _measure(planner: Planner, machine: Machine, output: Path, overwrite: bool, say: Say) -> None:
    """Keep this machine's speed in a file."""
    from gguforge.distill.planning.search import pace_here
    from gguforge.distill.planning.shapes import new_shapes

    pace = pace_here(planner, list(new_shapes(planner.family.shape)), machine.cores, say)
    pace.save(output, overwrite)
    constant, slope = pace.line
    say(f"{1 / slope / 1e9:.1f} GB/s, {constant * 1000:.2f} ms a token beside that: wrote {output}")


def _students(planner: Planner, machine: Machine, start: str | None, say: Say) -> list[Candidate]:
    """The best students first, and then the best of the other kind, for comparison.

    Raises:
        InputError: nothing fits, or the teacher cannot be cut.
    """
    from gguforge.distill.planning.search import propose
    from gguforge.distill.planning.shapes import new_shapes
    from gguforge.quant.errors import InputError

    family = planner.family
    new, cut = list(new_shapes(family.shape)), list(family.parts())
    if start == "cut" and not cut:
        raise InputError("only a checkpoint can be cut", path=family.teacher, remedy="Leave --from cut out.")
    pace = _pace(planner, machine, cut or new, say)
    if family.can_be_cut and planner.fits(planner.candidate(family.shape, pace), pace):
        say(f"the teacher itself fits: gguforge convert {family.teacher} -t {machine.preset}")
    here = machine.speed_of is None
    if start != "scratch" and cut and (start == "cut" or planner.best(cut, pace)):
        return propose(planner, cut, pace, here, say) + planner.best(new, pace)[:1]
    return propose(planner, new, pace, here, say) + planner.best(cut, pace)[:1]


def _pace(planner: Planner, machine: Machine, shapes: Sequence[Shape], say: Say) -> Pace | None:
    """The machine's speed, where it matters."""
    from gguforge.distill.planning.search import pace_here
    from gguforge.quant.errors import InputError
    from gguforge.runtime.pace import Pace

    if machine.speed_of is None:
        return None if machine.speed is None else pace_here(planner, shapes, machine.cores, say)
    pace = Pace.load(machine.speed_of)
    if pace.preset != planner.limits.preset:
        raise InputError(
            "the machine was measured with another type", path=machine.speed_of, expected=planner.limits.preset,
            found=pace.preset, remedy="Measure it again with -t.",
        )  # fmt: skip
    return pace


def _json(planner: Planner, students: Sequence[Candidate]) -> str:
    """What `--json` prints."""
    return json.dumps({"limits": asdict(planner.limits), "students": [_facts(planner, one) for one in students]})


def _facts(planner: Planner, one: Candidate) -> dict[str, Any]:
    """... of one student."""
    from gguforge.distill.planning.cost import cost

    return {
        **asdict(one.shape),
        "parameters": one.plan.elements,
        "without_embeddings": one.shape.body,
        "file_bytes": one.plan.size,
        "memory_bytes": one.memory,
        "forecast_speed": one.forecast,
        "measured_speed": one.measured,
        "expected_loss": one.loss,
        "training": asdict(cost(one.shape, planner.family, planner.budget)),
    }


def _table(planner: Planner, students: Sequence[Candidate]) -> str:
    """For people."""
    from gguforge.convert.names import size_label
    from gguforge.distill.planning.cost import cost

    rows = [["student", "from", "weights", "file", "memory", "tokens/s", "measured", "training", "time", "its memory"]]
    for one in students:
        needs = cost(one.shape, planner.family, planner.budget)
        speeds = ["-" if speed is None else f"{speed:.1f}" for speed in (one.forecast, one.measured)]
        start = "teacher" if one.shape.cut else "scratch"
        sizes = [size_label(one.plan.elements), in_words(one.plan.size), in_words(one.memory)]
        training = [f"{size_label(needs.tokens)} tokens", _duration(needs.hours), in_words(needs.memory)]
        rows.append([str(one.shape), start, *sizes, *speeds, *training])
    return table(rows, right=range(2, 10))


def _duration(hours: float | None) -> str:
    """Hours for people; a dash where nobody knows.

    >>> _duration(0.01), _duration(1.5), _duration(100)
    ('36 s', '1.5 h', '4.2 days')
    """
    if hours is None:
        return "-"
    if hours < 1:
        return f"{60 * hours:.0f} min" if hours > 1 / 60 else f"{3600 * hours:.0f} s"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _write(planner: Planner, best: Candidate, output: Path, material: Material, overwrite: bool) -> list[Path]:
    """Write the recipe of a student."""
    from gguforge.distill.planning.cost import cost
    from gguforge.distill.planning.proposal import write_proposal

    needs = cost(best.shape, planner.family, planner.budget)
    return write_proposal(output, best, needs, planner.family, planner.limits, material, overwrite)
