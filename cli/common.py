"""What the commands share: options, sizes in words, progress bars, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])

WIDEST_COLUMN = 80
"""Longer cells stick out: one hostile name must not widen every line of a table."""


def quiet_option(command: Command) -> Command:
    """`--quiet`: no progress bar, no remarks."""
    return click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and what was asked for.")(command)


def threads_option(command: Command) -> Command:
    """`--threads`, for commands that run a model."""
    option = click.option(
        "-t", "--threads", type=click.IntRange(1, 256), help="Threads to use.  [default: physical cores]"
    )
    return option(command)


def chunk_options(least: int) -> Callable[[Command], Command]:
    """`--chunks` and `--context`, for commands that read a text in chunks of at least so many tokens."""
    chunks = click.option("--chunks", type=click.IntRange(1), help="Chunks to read.  [default: all]")
    context = click.option(
        "-c", "--context", type=click.IntRange(least), default=512, show_default=True, help="Tokens of a chunk."
    )
    return lambda command: chunks(context(command))


def gathered(kind: type, name: str, *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options whose values reach the command as one argument `name`: a dataclass `kind` with a field for each."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(*arguments: Any, **values: Any) -> Any:
            mine = {field.name: values.pop(field.name) for field in fields(kind) if field.init}
            return command(*arguments, **values, **{name: kind(**mine)})

        decorated = cast(Command, run)
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def warn(line: str) -> None:
    """Tell of something that is likely a mistake and stops nothing."""
    click.echo(click.style("warning: ", fg="yellow", bold=True) + line, err=True)


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
