"""What the commands share: options, sizes in words, progress bars, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gguforge.quant.errors import printable

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan

Command = TypeVar("Command", bound=Callable[..., Any])

WIDEST_COLUMN = 80
"""Longer cells stick out: one hostile name must not widen every line of a table."""


def quiet_option(command: Command) -> Command:
    """`--quiet`: no progress bar, no remarks."""
    return click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what was asked for.")(command)


def writing_options(command: Command) -> Command:
    """The options of every command that executes a plan."""
    options = (
        click.option("-o", "--output", type=click.Path(), help="The file to write."),
        click.option("--overwrite", is_flag=True, help="Replace the output if it exists."),
        click.option(
            "--workers",
            type=click.IntRange(1, 256),
            help="Processes to use.  [default: all, or one for mere copies]",
        ),
        click.option("--dry-run", is_flag=True, help="Print size, memory and disk needed, at once, and write nothing."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        quiet_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def in_words(nbytes: float) -> str:
    """A byte count for people, in powers of 1024.

    >>> in_words(4_900_000_000)
    '4.56 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


@contextmanager
def progress_bar(total: int, label: str, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr that counts bytes; None when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no watching thread: workers are forked, which wants a single thread
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        yield lambda nbytes: bar.update(nbytes) and None


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns, the first row being the head; columns listed in `right` align right."""
    widths = [min(WIDEST_COLUMN, max(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


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


def print_fallbacks(plan: Plan) -> None:
    """Say on stderr which tensors got another type than the preset wanted, and why; equal cases share a line."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for tensor in plan.tensors:
        if tensor.fallback is not None:
            groups.setdefault((tensor.fallback.name, tensor.type.name, tensor.row_length), []).append(tensor.name)
    for (wanted, got, length), names in groups.items():
        shown = printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        click.echo(f"{got} instead of {wanted} (rows of {length} are no whole number of blocks): {shown}", err=True)


def print_dry_run(plan: Plan, output: str, workers: int | None) -> None:
    """What executing the plan will cost."""
    import shutil
    from pathlib import Path

    from gguforge.quant.quantize import types_count
    from gguforge.quant.writer import default_workers, peak_memory

    folder = Path(output).absolute().parent
    free = f" ({in_words(shutil.disk_usage(folder).free)} free)" if folder.is_dir() else ""
    workers = workers or default_workers(plan)
    rows = [["type", "tensors", "bytes"]]
    rows += [[kind.name, str(count), f"{nbytes:,}"] for kind, (count, nbytes) in types_count(plan).items()]
    click.echo(f"output  {output}")
    click.echo(f"size    {plan.size:,} bytes ({in_words(plan.size)}, {plan.bits_per_weight:.2f} bits per weight)")
    click.echo(
        f"memory  at most {in_words(peak_memory(plan, workers))} for {workers} worker{'s' if workers > 1 else ''}"
    )
    click.echo(f"disk    {in_words(plan.size)} in {folder}{free}")
    click.echo()
    click.echo(table(rows, right=(1, 2)))
