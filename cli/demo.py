"""`gguforge demo`: the whole pipeline on the small model that ships inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gguforge.distill.demo.demonstration import Version

EXAMPLES = """\b
Examples:
  gguforge demo
  gguforge demo --output demo/ --prompt "What is a super-block?"
  echo "Which type should I use?" | gguforge demo
"""

COLUMNS = "{:<8} {:>12} {:>9} {:>8}   {}"
ANSWER_COLUMN = len(COLUMNS.format("", "", "", "", ""))


@click.command(epilog=EXAMPLES)
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="Keep the files and the checkpoint in this folder.  [default: a temporary one]",
)
@click.option("-p", "--prompt", help="What each version is asked for the table.")
@click.option("--overwrite", is_flag=True, help="Replace the files if they exist.")
@click.pass_context
def command(context: click.Context, output: str | None, prompt: str | None, overwrite: bool) -> None:
    """Run the whole pipeline on the small model that ships inside.

    Converts its checkpoint to BF16, quantizes that to Q4_K_M and Q2_K, asks each file the same, and opens the chat with
    the Q4_K_M file. Where stdin is not a terminal, the question piped in (or the table's) is answered instead.
    """
    from gguforge.cli.chat import command as chat
    from gguforge.distill.demo.demonstration import CHATTING, QUESTION, copy_checkpoint, versions

    question = prompt or QUESTION
    piped = _piped()
    with _folder(output) as folder:
        click.echo(f"Asked: {question}\n")
        click.echo(COLUMNS.format("type", "bytes", "bits/wt", "seconds", "answer"))
        made = {}
        for version in versions(folder, question, overwrite=overwrite):
            click.echo(_row(version))
            made[version.type] = version.path
        if output is not None:
            copy_checkpoint(folder)
            click.echo(f"\nThe files and the checkpoint are in {folder}.", err=True)
        click.echo()
        context.invoke(chat, model=str(made[CHATTING]), prompt=None if piped is None else piped or question)


def _piped() -> str | None:
    """What is piped in; None where a person sits at the keyboard."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        return None
    return sys.stdin.buffer.read().decode("utf-8-sig", "replace").strip()


@contextmanager
def _folder(output: str | None) -> Iterator[Path]:
    """The folder for the files: the user's, or a temporary one that goes away."""
    from tempfile import TemporaryDirectory

    if output is None:
        with TemporaryDirectory(prefix="gguforge-demo-") as folder:
            yield Path(folder)
    else:
        Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output)


def _row(version: Version) -> str:
    """One line of the table, the answer folded to the width of the terminal."""
    from shutil import get_terminal_size
    from textwrap import wrap

    width = max(30, get_terminal_size((120, 24)).columns - ANSWER_COLUMN - 1)
    lines = wrap(version.answer, width) or [""]
    first = COLUMNS.format(
        version.type, f"{version.nbytes:,}", f"{version.bits_per_weight:.2f}", f"{version.seconds:.2f}", lines[0]
    )
    return "\n".join([first, *(" " * ANSWER_COLUMN + line for line in lines[1:])])
