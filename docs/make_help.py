"""Makes docs/help.md from the `--help` pages of all commands; a test checks that it is up to date.

Run after a change of the command line: `python3 docs/make_help.py`.
"""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from gguforge.cli import distill
from gguforge.cli.main import COMMANDS, cli

PAGE = Path(__file__).parent / "help.md"


def help_pages() -> str:
    """All help pages as Markdown."""
    parts = ["# Commands", "Made by docs/make_help.py from the command line itself."]
    for words in ([], *([name] for name in COMMANDS), *(["distill", name] for name in distill.COMMANDS)):
        title = " ".join(["gguforge", *words])
        result = CliRunner().invoke(cli, [*words, "--help"], prog_name="gguforge", terminal_width=100)
        assert result.exit_code == 0, result.output
        parts.append(f"## {title}\n\n```\n{result.output.strip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(help_pages(), encoding="utf-8")
