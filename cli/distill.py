"""`gguforge distill`: a group; each of its commands lives in cli/distill_<name>.py."""

from __future__ import annotations

import click

from gguforge.cli.lazy import LazyGroup

COMMANDS = {
    "plan": "Propose a student for a machine, from its memory and its measured speed.",
    "run": "Follow a recipe the whole way, from the teacher to files that chat.",
    "generate": "Let a teacher answer prompts: conversations to learn from.",
    "collect": "Write down what a teacher expects after every token of a text: soft targets.",
    "import": "Turn what DistillKit captured into soft targets.",
    "export": "Write soft targets in DistillKit's form.",
    "train": "Train a student by a recipe, on the very blocks that it will ship in if you like.",
}
"""Every command of the group with its one-line help."""


@click.group("distill", cls=LazyGroup, table=COMMANDS, modules="gguforge.cli.distill_")
def command() -> None:
    """Make a small model from a large one.

    \b
    Examples:
      gguforge distill run recipe.toml -o student/
      gguforge distill collect teacher-Q8_0.gguf -f text.txt -o targets/
      gguforge distill train recipe.toml -o student/
    """
