"""`gguforge quantize --quality` from the outside."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from running import refused, run, run_here
from small_model import write_model_and_text

from gguforge.cli.writing import Writing
from gguforge.quant.plan import Plan


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
    found = run(*words, "--calibration-chunks", 1, "--threads", 1, "-o", tmp_path / "a.gguf", "--json", "-q")
    assert json.loads(found.stdout)["output"] == str(tmp_path / "a.gguf")
    assert found.stderr == ""
    assert not list(tmp_path.glob("*.tune"))
    shown = run("inspect", tmp_path / "a.gguf", "--json").stdout
    assert "text.txt" in shown
    (tmp_path / "renamed.txt").write_bytes((folder / "text.txt").read_bytes())
    done = run("evaluate", tmp_path / "a.gguf", "-f", tmp_path / "renamed.txt", "-c", 64, "--chunks", 1)
    assert "warning: this very text served to" in done.stderr
    refused(run("verify", tmp_path / "a.gguf", "--source", folder / "model.gguf"), "--quality best")
    assert not run("verify", tmp_path / "a.gguf").returncode


def test_a_forecast_before_the_work(folder: Path, tmp_path: Path) -> None:
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "best", "-f", folder / "text.txt"]
    done = run(*words, "--threads", 1, "--dry-run", "-o", tmp_path / "a.gguf")
    assert "tuning on 2 chunks takes about " in done.stdout, done.stderr
    assert "of memory and " in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_clock_runs_from_the_beginning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(plan: Plan, writing: Writing) -> None:
        object.__setattr__(writing, "begun", writing.begun - 100)  # as if what came before took so long

    monkeypatch.setattr("gguforge.cli.tuning.hint_at_grids", slow)
    done = run_here("quantize", folder / "model.gguf", "-t", "Q4_0", "-o", tmp_path / "a.gguf", "--json")
    assert json.loads(done.stdout)["seconds"] > 100


def test_high_needs_no_text(folder: Path, tmp_path: Path) -> None:
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "high", "--threads", 1]
    done = run(*words, "-o", tmp_path / "a.gguf")
    assert "tuning on 8 chunks takes about " in done.stderr
    receipt = json.loads((tmp_path / "a.gguf.json").read_text())
    for tensor in receipt["tensors"]:  # of the original weights
        copied = tensor["type"] == tensor["source_type"]
        assert tensor["relative_error"] == 0 if copied else 0.001 < tensor["relative_error"] < 0.3
    assert not run("verify", tmp_path / "a.gguf").returncode


def test_what_was_tuned_is_proved_on_the_end_of_the_text(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{i} hello user, a list. " for i in range(800)), encoding="utf-8")
    out = tmp_path / "a.gguf"
    words = ["quantize", folder / "model.gguf", "-t", "Q4_0", "--quality", "high", "-f", text, "--threads", 1]
    done = run(*words, "--calibration-chunks", 1, "-o", out)
    assert re.search(r"KLD 0\.\d+ ± 0\.\d+ from model.gguf on 1 chunks of 512 tokens of long.txt", done.stderr)
    (measured,) = json.loads(Path(f"{out}.json").read_text())["measured"]
    assert measured["skip"] >= 15
    assert measured["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    facts = json.loads(run("inspect", out, "--json").stdout)
    assert facts["measured"] == [measured]
    assert facts["metadata"]["gguforge.quality"]["value"] == "high"
    assert facts["metadata"]["gguforge.calibration.sha256"]["value"] == measured["text_sha256"]
    assert "long.txt" in run("verify", out).stdout


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


def test_an_evaluation_goes_into_the_receipt(folder: Path, tmp_path: Path) -> None:
    out, model, text = tmp_path / "a.gguf", folder / "model.gguf", folder / "text.txt"
    assert not run("quantize", model, "-t", "Q4_0", "-o", out).returncode
    before = out.read_bytes()
    assert b"gguforge" not in before, "the default is llama-quantize's file"
    words = ["evaluate", out, "-f", text, "--against", model, "-t", 1, "--receipt"]
    for chunks in (1, 1, 2):  # the same again takes the place of what was there
        done = run(*words, "--chunks", chunks, "-c", 128)
        assert done.returncode == 0, done.stderr
    assert out.read_bytes() == before
    receipt = json.loads(Path(f"{out}.json").read_text())
    assert [one["chunks"] for one in receipt["measured"]] == [1, 2]
    assert {one["digest"] for one in receipt["measured"]} == {receipt["digest"]}
    assert receipt["measured"][0]["against_sha256"] == receipt["sources"]["model.gguf"]["sample_sha256"]
    assert "from model.gguf on 2 chunks of 128 tokens of text.txt" in run("verify", out).stdout
    assert "from model.gguf on 2 chunks of 128 tokens of text.txt" in run("inspect", out).stdout

    receipt["measured"][0]["digest"] = "0" * 64
    Path(f"{out}.json").write_text(json.dumps(receipt))
    refused(run("verify", out), "has a measurement of another file: KLD")
    out.write_bytes(before + bytes(32))
    refused(run(*words), "is the receipt of another file")
    Path(f"{out}.json").unlink()
    refused(run(*words, "--chunks", 1), "no receipt of this file")


def test_metadata_that_say_otherwise_than_the_receipt(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    assert not run("quantize", folder / "model.gguf", "-t", "Q4_0", "--rules", "modern", "-o", out).returncode
    told = json.loads(run("inspect", out, "--json").stdout)["metadata"]
    receipt = json.loads(Path(f"{out}.json").read_text())
    assert told["gguforge.tool"]["value"] == receipt["tool"]
    assert told["gguforge.rules.name"]["value"] == "modern"
    assert told["gguforge.rules.sha256"]["value"] == receipt["settings"]["rules"]["sha256"]
    assert told["gguforge.source.name"]["value"] == "model.gguf"
    receipt["settings"]["rules"]["sha256"] = "0" * 64
    Path(f"{out}.json").write_text(json.dumps(receipt))
    refused(run("verify", out), "says otherwise than the receipt: gguforge.rules.sha256")
