"""`gguforge quantize --quality` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import refused, run
from small_model import write_model_and_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, whose rows of 64 take no k-quants, and text.txt."""
    return write_model_and_text(tmp_path_factory.mktemp("quality"))


def test_exact_is_the_default(folder: Path, tmp_path: Path) -> None:
    for name, more in {"a": [], "b": ["--quality", "exact"]}.items():
        assert not run("quantize", folder / "model.gguf", "-t", "Q4_0", "-o", tmp_path / name, *more).returncode
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_best_reads_the_text_and_tidies_up(folder: Path, tmp_path: Path) -> None:
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "best", "-f", folder / "text.txt"]
    found = run(
        *words, "--calibration-chunks", 1, "--threads", 1, "-o", tmp_path / "a.gguf", "--json", "-q", "--receipt"
    )
    assert json.loads(found.stdout)["output"] == str(tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.tune"))
    shown = run("inspect", tmp_path / "a.gguf", "--json").stdout
    assert "text.txt" in shown
    refused(run("verify", tmp_path / "a.gguf", "--source", folder / "model.gguf"), "--quality best")
    assert not run("verify", tmp_path / "a.gguf").returncode


def test_a_dry_run_reads_no_text(folder: Path, tmp_path: Path) -> None:
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "best", "-f", tmp_path / "nowhere.txt"]
    assert not run(*words, "--dry-run").returncode


def test_an_output_that_exists_is_found_before_the_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "best", "-f", folder / "text.txt"]
    refused(run(*words, "-o", tmp_path / "a.gguf"), "exists")
    assert not list(tmp_path.glob("*.tune"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quality", "best"], "needs a calibration text"),
        (["-f", "text.txt"], "is for --quality high or best"),
        (["--quality", "finest"], "Invalid value for '--quality'"),
    ],
)
def test_options_that_do_not_belong_together(folder: Path, words: list[str], said: str) -> None:
    refused(run("quantize", folder / "model.gguf", "-t", "Q4_0", *words), said, code=2)
