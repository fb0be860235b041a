"""`gguforge distill train` through the installed script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import SMALL_K, Case, build, like
from running import refused, run

RECIPE = """
[data]
text = ["text.txt"]
held_out = ["text.txt"]
context = 32
[teacher]
checkpoint = "teacher"
[student]
checkpoint = "teacher"
[losses]
forward_kl = 1
[schedule]
steps = 2
batch = 2
[blocks]
preset = "Q4_0"
[report]
baseline = false
[hardware]
device = "cpu"
threads = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = like(SMALL_K, num_hidden_layers=1, intermediate_size=256)
    build(Case(config), tmp_path).rename(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("she sells sea shells on the shore. " * 8)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_gives_blocks_that_other_commands_read(folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    done = run("distill", "train", folder / "recipe.toml", "-o", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["runs"]["student-0"]["losses"]) == 2
    assert "a process will need about" in done.stderr
    assert run("inspect", folder / "out" / "model.gguf").returncode == 0
    assert run("convert", folder / "out" / "checkpoint", "-o", folder / "made.gguf").returncode == 0


def test_a_misspelt_key_is_one_line(folder: Path) -> None:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.replace("steps", "stpes"))
    refused(run("distill", "train", path, "-o", folder / "out"), "unknown key 'schedule.stpes'. Did you mean 'steps'?")
    assert not (folder / "out").exists()
