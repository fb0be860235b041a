"""What every command that executes a plan shares: its options, the dry run, the writing, and what it prints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import Command, gathered, in_words, progress_bar, quiet_option, table
from gguforge.quant.errors import printable

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan


@dataclass(frozen=True)
class Writing:
    """The options of every command that executes a plan.

    Attributes:
        output: the file to write, None for the command's choice.
        overwrite: replace it if it exists.
        workers: processes, None for the writer's choice.
        dry_run: write nothing, tell what it would take.
        as_json: print the result as JSON.
        quiet: print nothing but errors and what was asked for.
    """

    output: str | None
    overwrite: bool
    workers: int | None
    dry_run: bool
    as_json: bool
    quiet: bool

    def execute(
        self, plan: Plan, default_output: str, label: str, facts: Mapping[str, Any], explain: bool = False
    ) -> None:
        """Write the plan's file, or with `--dry-run` none, and print what was or would be done.

        Args:
            plan: what to write.
            default_output: the file, where the user names none.
            label: the type's name.
            facts: what the command itself adds to the JSON.
            explain: tell for each tensor the rule that chose its type.
        """
        output = self.output or default_output
        result = {"output": output, "type": label, **plan_summary(plan), **facts}
        if self.as_json and explain:
            result["rules"] = [{"tensor": t.name, "type": t.type.name, "rule": t.reason} for t in plan.tensors]
        if self.dry_run:
            result |= needs(plan, output, self.workers)
        if self.dry_run and not self.as_json:
            print_dry_run(plan, output, self.workers)
        if explain and not self.as_json:
            print_explanation(plan)
        if not self.dry_run:
            result["seconds"] = round(self._write(plan, output, label), 3)
        if not self.quiet:
            print_fallbacks(plan)
        if self.as_json:
            click.echo(json.dumps(result))
        elif not self.dry_run and not self.quiet:
            size = f"{in_words(plan.size)}, {plan.bits_per_weight:.2f} bits per weight"
            click.echo(f"{output}: {size}, {result['seconds']:.1f} s")

    def _write(self, plan: Plan, output: str, label: str) -> float:
        """Returns the seconds it took."""
        from gguforge.quant.writer import write

        start = time.perf_counter()
        with progress_bar(plan.size, label, self.quiet) as progress:
            write(plan, output, workers=self.workers, overwrite=self.overwrite, progress=progress)
        return time.perf_counter() - start


def writing_options(command: Command) -> Command:
    """The options of every command that executes a plan; they reach it as the argument `writing`."""
    return gathered(
        Writing,
        "writing",
        click.option("-o", "--output", type=click.Path(), help="The file to write."),
        click.option("--overwrite", is_flag=True, help="Replace the output if it exists."),
        click.option(
            "--workers",
            "--threads",
            "workers",
            type=click.IntRange(1, 256),
            help="Processes to use.  [default: all, or one for mere copies]",
        ),
        click.option("--dry-run", is_flag=True, help="Print size, memory and disk needed, at once, and write nothing."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        quiet_option,
    )(command)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The facts about a plan that `--json` prints."""
    from gguforge.quant.quantize import types_count

    return {
        "bytes": plan.size,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "tensors": len(plan.tensors),
        "weights": plan.elements,
        "types": {kind.name: {"tensors": n, "bytes": nbytes} for kind, (n, nbytes) in types_count(plan).items()},
        "fallbacks": [
            {"tensor": t.name, "row_length": t.row_length, "wanted": t.fallback.name, "type": t.type.name}
            for t in plan.tensors
            if t.fallback is not None
        ],
    }


def needs(plan: Plan, output: str, workers: int | None) -> dict[str, int | None]:
    """Memory and disk that executing a plan takes, in bytes; what is free is None where the folder is missing."""
    from gguforge.quant.writer import peak_memory

    folder = Path(output).absolute().parent
    free = shutil.disk_usage(folder).free if folder.is_dir() else None
    return {"memory_bytes": peak_memory(plan, workers), "disk_bytes": plan.size, "disk_free_bytes": free}


def print_dry_run(plan: Plan, output: str, workers: int | None) -> None:
    """What executing the plan will cost."""
    from gguforge.quant.quantize import types_count
    from gguforge.quant.writer import default_workers

    need = needs(plan, output, workers)
    free = need["disk_free_bytes"]
    workers = workers or default_workers(plan)
    rows = [["type", "tensors", "bytes"]]
    rows += [[kind.name, str(count), f"{nbytes:,}"] for kind, (count, nbytes) in types_count(plan).items()]
    click.echo(f"output  {output}")
    click.echo(f"size    {plan.size:,} bytes ({in_words(plan.size)}, {plan.bits_per_weight:.2f} bits per weight)")
    most = in_words(need["memory_bytes"] or 0)
    click.echo(f"memory  at most {most} for {workers} worker{'s' if workers > 1 else ''}")
    left = f" ({in_words(free)} free)" if free is not None else ""
    click.echo(f"disk    {in_words(plan.size)} in {Path(output).absolute().parent}{left}")
    click.echo()
    click.echo(table(rows, right=(1, 2)))


def print_explanation(plan: Plan) -> None:
    """Name, type and the rule that chose it, a line each."""
    rows = [["name", "type", "rule"]]
    rows += [[printable(tensor.name), tensor.type.name, tensor.reason] for tensor in plan.tensors]
    click.echo(table(rows))


def print_fallbacks(plan: Plan) -> None:
    """Say on stderr which tensors got another type than the preset wanted, and why; equal cases share a line."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.fallback is not None:
            groups.setdefault((tensor.fallback.name, tensor.type.name, tensor.row_length), []).append(tensor.name)
    for (wanted, got, length), names in groups.items():
        shown = printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        click.echo(f"{got} instead of {wanted} (rows of {length} are no whole number of blocks): {shown}", err=True)
