"""Documents that execute: help pages, the README's commands, its file tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_help_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_help", ROOT / "docs" / "make_help.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = (ROOT / "docs" / "help.md").read_text(encoding="utf-8")
    assert page == made.help_pages(), "run: python3 docs/make_help.py"


def test_tree_in_the_readme_is_the_tree_on_disk() -> None:
    named = set(re.findall(r"^    (\S+/)\s{2,}", README, re.MULTILINE))
    on_disk = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and is_tracked(path.name)}
    assert named == on_disk


def is_tracked(name: str) -> bool:
    """Folders that belong to the project, not to tools and builds."""
    return not name.startswith(".") and name not in {"build", "dist", "__pycache__"} and not name.endswith(".egg-info")


def test_every_dependency_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (requirement for listed in lists for requirement in listed if "gguforge[" not in requirement):
        assert re.search(rf'"{re.escape(requirement)}",?\s+# \S+', text), requirement


def console_commands() -> list[tuple[str, str]]:
    """Every command of the README's console blocks with the output that stands below it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip()))
    return found


def masked(text: str) -> list[str]:
    """Lines without what differs between runs and machines: seconds, threads, memory, disk, paths, runs of spaces."""
    text = re.sub(r"\d+\.\d+ s\b|\b\d+ threads?", "#", text)
    text = re.sub(r"^(memory|disk) .*", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\S*/", "", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]


@pytest.fixture
def environment() -> dict[str, str]:
    """A shell that finds the installed script first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "COLUMNS": "120"}


def test_commands_of_the_readme_print_what_it_says(environment: dict[str, str], tmp_path: Path) -> None:
    """In order and in one folder, since later commands use the files of earlier ones."""
    commands = console_commands()
    assert len(commands) >= 5
    for command, expected in commands:
        words = ["bash", "-c", command]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed = masked(done.stdout + done.stderr)
        assert printed, command
        if not a_model_speaks(command):
            missing = [line for line in masked(expected) if line != "..." and line not in printed]
            assert not missing, f"{command}\n" + "\n".join(printed)


def a_model_speaks(command: str) -> bool:
    """Whether the output holds an answer: its words may differ on another processor."""
    return bool({"chat", "demo"} & set(shlex.split(command)))
