"""`gguforge evaluate` as a process: what goes where, exit codes, the warning about calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import refused, run, run_here
from small_model import write_model_and_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("evaluate"))


def command(name: str, *arguments: object) -> tuple[int, str, str]:
    done = run(name, *arguments, *(() if "--merge" in arguments else ("-t", 1)))
    return done.returncode, done.stdout, done.stderr


def test_perplexity(folder: Path) -> None:
    code, out, err = command("evaluate", folder / "model.gguf", "-f", folder / "text.txt", "-c", 64)
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("perplexity  ")
    assert " ± " in first
    assert last.endswith("chunks of 64)")


def test_against_a_reference(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "model.gguf", folder / "text.txt"
    code, out, _ = command("evaluate", model, "-f", text, "-c", 64, "--against", model)
    assert code == 0
    for name in ("median KLD", "99 % KLD", "99.9 % KLD", "maximum KLD", "same top token", "RMS change"):
        assert name in out
    assert command("evaluate", model, "-f", text, "-c", 64, "--save-base", tmp_path / "b.kld", "-q")[0] == 0
    code, out, err = command("evaluate", model, "--against", tmp_path / "b.kld", "--json")
    facts = json.loads(out)
    assert (code, err, facts["context"], facts["text"]) == (0, "", 64, None)
    assert facts["same_top"]["value"] == 1
    assert set(facts["kld_quantiles"]) == {"0.5", "0.9", "0.95", "0.99", "0.999", "1.0"}


def test_calibration_text_is_warned_of(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "model.gguf", folder / "text.txt"
    assert command("calibrate", model, "-f", text, "-o", tmp_path / "i.gguf", "-c", 64, "--chunks", 4)[0] == 0
    code, out, err = command("evaluate", model, "-f", text, "-c", 64, "--imatrix", tmp_path / "i.gguf", "--json")
    assert code == 0
    assert "of this text's passages are in the calibration text" in err
    assert 0 < json.loads(out)["calibration_overlap"] < 1
    assert command("calibrate", "--merge", tmp_path / "i.gguf", "-o", tmp_path / "i.dat")[0] == 0
    code, _, err = command("evaluate", model, "-f", text, "-c", 64, "--imatrix", tmp_path / "i.dat")
    assert (code, "the same name" in err) == (0, True)


def test_errors(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "model.gguf", folder / "text.txt"
    for arguments, code, message in (
        ((model,), 2, "Give a text with -f"),
        ((model, "-f", text, "-c", 4096), 1, "the text is too short"),
        ((model, "-f", text, "--against", text), 1, "this is not a GGUF file"),
        ((text, "-f", text), 1, "this is not a GGUF file"),
        ((model, "-f", text, "--imatrix", model), 1, "is not an importance matrix"),
    ):
        refused(run_here("evaluate", *arguments), message, code)
