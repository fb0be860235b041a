"""`gguforge distill plan` through the installed script: what is refused, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import SMALL_K, Case, build, like
from running import refused, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    build(Case(like(SMALL_K, num_hidden_layers=9)), folder).rename(folder / "teacher")
    measured = {"format": 1, "preset": "Q4_0", "threads": 1, "points": [{"bytes": 10**8, "seconds": 0.01}]}
    (folder / "laptop.json").write_text(json.dumps(measured))
    return folder


def test_when_nothing_fits_one_line_names_the_nearest(folder: Path) -> None:
    done = run(
        "distill", "plan", "--teacher", folder / "teacher", "--memory", "70MB", "--speed", 5, "--type", "Q4_0",
        "--speed-of", folder / "laptop.json",
    )  # fmt: skip
    refused(done, "no student fits (expected 70 MB and 5 tokens/s, found ")
    assert "for the nearest, 7 layers x 256, ffn 512, heads 4/1). Allow that, " in done.stderr


def test_a_measurement_with_another_type_is_refused(folder: Path) -> None:
    done = run("distill", "plan", "--memory", "1GB", "--speed-of", folder / "laptop.json")
    refused(done, "the machine was measured with another type (expected Q4_K_M, found Q4_0). Measure it again with -t.")


def test_a_teacher_too_small_for_students_is_refused(tmp_path: Path) -> None:
    build(Case(like(SMALL_K, hidden_size=64, num_hidden_layers=1)), tmp_path).rename(tmp_path / "teacher")
    done = run("distill", "plan", "--teacher", tmp_path / "teacher", "--memory", "1GB", "-q", "--speed", 5)
    refused(done, "the teacher is too small for a smaller student of 256 channels")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measure"], "--measure needs -o"),
        (["-o", "recipe.toml"], "A recipe needs a text to train on: -f."),
    ],
)
def test_options_that_belong_together(words: list[str], message: str) -> None:
    refused(run("distill", "plan", *words), message, code=2)


def test_a_budget_that_is_none_is_one_line() -> None:
    done = run("distill", "plan", "--memory", "1GB", "--budget", "soon")
    refused(done, "'soon' is no budget (expected hours or tokens, such as 12h or 500M)")
