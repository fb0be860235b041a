"""A group of commands that are imported when they run, not when the program starts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group that knows its commands by name and one line of help.

    Args:
        table: every command with its line.
        modules: what precedes the command's name in its module's; the module defines a click command `command`.
    """

    def __init__(self, *words: Any, table: Mapping[str, str], modules: str, **named: Any) -> None:
        super().__init__(*words, **named)
        self._table, self._modules = table, modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        command = importlib.import_module(f"{self._modules}{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._table.items()))
