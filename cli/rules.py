"""The options about rules: which of them choose the types, and the text of a built-in table."""

from __future__ import annotations

import click

DEFAULT_RULES = "llama.cpp"

rules_option = click.option(
    "--rules",
    default=DEFAULT_RULES,
    show_default=True,
    metavar="NAME|FILE",
    help="Rules that choose the types: llama.cpp's, modern, or your own in a TOML file.",
)


def _print(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    if name is None or context.resilient_parsing:
        return
    from gguforge.quant.rule_files import rules_text

    click.echo(rules_text(name), nl=False)
    context.exit()


print_rules_option = click.option(
    "--print-rules",
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=_print,
    help="Print a built-in rule table (modern) to copy and edit, and exit.",
)
