"""`gguforge compare` as a process: the table, the JSON, the page, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import refused, run
from small_model import write_model_and_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model_and_text(tmp_path_factory.mktemp("compare"))
    for preset in ("Q8_0", "Q4_0"):
        done = run("quantize", made / "model.gguf", "--type", preset, "-o", made / f"{preset}.gguf", "-q")
        assert done.returncode == 0, done.stderr
    return made


def arguments(folder: Path) -> list[object]:
    models = [folder / "Q8_0.gguf", folder / "Q4_0.gguf"]
    given = ["--against", folder / "model.gguf", "-f", folder / "text.txt", "-c", 64, "--chunks", 3, "-t", 1]
    return ["compare", *models, *given]


def test_the_table_is_sorted_by_size(folder: Path) -> None:
    done = run(*arguments(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["Q4_0.gguf", "Q8_0.gguf"]


def test_calibration_text_is_warned_of(folder: Path, tmp_path: Path) -> None:
    text, matrix, out = folder / "text.txt", tmp_path / "i.gguf", tmp_path / "guided.gguf"
    assert run("calibrate", folder / "model.gguf", "-f", text, "-o", matrix, "-c", 64).returncode == 0
    words = ("quantize", folder / "model.gguf", "--type", "Q4_0", "--imatrix", matrix, "-o", out, "-q")
    assert run(*words).returncode == 0
    done = run("compare", out, *arguments(folder)[2:], "--json")
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: guided.gguf: 100.0 % of this text's passages are in the calibration text")
    assert [one["calibration_overlap"] for one in json.loads(done.stdout)["models"]] in ([1, None], [None, 1])


def test_json_and_report(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    done = run(*arguments(folder), "--report", page, "--map-chunks", 1, "--prompt", "hello", "--json", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    models = json.loads(done.stdout)["models"]
    assert models[0]["kld_mean"]["value"] > models[1]["kld_mean"]["value"] > 0
    assert models[0]["frontier"]
    assert models[0]["parts"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"], "nothing else is left"
    refused(run(*arguments(folder), "--report", page), "file exists")


def test_refusals(folder: Path, tmp_path: Path) -> None:
    refused(run("compare", tmp_path / "no-such.gguf", *arguments(folder)[3:]), "no-such.gguf")
    done = run(*arguments(folder), "--prompt", "hello")
    assert done.returncode == 2
    assert "--report" in done.stderr
