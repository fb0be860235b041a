"""`gguforge distill collect` as a process: what it prints, what it refuses, what a killed run leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from running import linux, refused, run, run_here, start, wait_until
from small_model import write_model_and_text

from gguforge.distill.targets import open_targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_and_text(tmp_path_factory.mktemp("collect"))
    lines = (json.dumps({"text": f"{i} hello user, a list of files. " * 4}) + "\n" for i in range(200))
    (folder / "lines.jsonl").write_text("".join(lines))
    return folder


def test_targets_and_what_is_said_of_them(folder: Path, tmp_path: Path) -> None:
    words = ("distill", "collect", folder / "model.gguf", "-f", folder / "text.txt", "-o", tmp_path / "t", "-t", 1)
    done = run(*words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts, targets = json.loads(done.stdout), open_targets(tmp_path / "t")
    assert facts["shards"] == {"made": 1, "kept": 0, "missing": 0}
    assert (facts["tokens"], facts["rows"], facts["key"]) == (targets.tokens, targets.rows, targets.manifest.key)
    assert facts["bytes_per_token"] == pytest.approx(targets.nbytes / targets.tokens, abs=0.01)
    assert facts["teacher_loss"] == pytest.approx(targets.teacher_loss())
    again = run(*words)
    assert (again.returncode, again.stderr) == (0, "")
    assert "1 shards (0 new)" in again.stdout
    assert f"{facts['bytes_per_token']:.1f} bytes a token" in again.stdout
    assert f"teacher: {facts['teacher_loss']:.4f} nats a token\n" in again.stdout
    assert run(*words, "-q").stdout == ""
    top = run(*words[:-3], tmp_path / "k", "--top-k", 5)
    assert "top-k targets are biased" in top.stdout
    assert "better teachers" not in top.stdout
    assert run("quantize", folder / "model.gguf", "-t", "Q4_0", "-o", tmp_path / "q.gguf", "-q").returncode == 0
    coarse = run("distill", "collect", tmp_path / "q.gguf", "-f", folder / "text.txt", "-o", tmp_path / "q", "-t", 1)
    assert "q.gguf is Q4_0: F16 or Q8_0 make better teachers" in coarse.stdout


def test_usage_and_input_errors(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "model.gguf", folder / "text.txt"
    for arguments, code, message in (
        ((), 2, "Missing argument 'TEACHER...'"),
        ((model, "-o", tmp_path / "t"), 2, "Missing option '-f'"),
        ((model, "-f", text, "-o", tmp_path / "t", "--top-k", 5, "--full"), 2, "exclude each other"),
        ((model, "-f", text, "-o", tmp_path / "t", "--weight", 1, "--weight", 2), 2, "once for each of the 1"),
        ((model, "-f", text, "-o", tmp_path / "t", "--shard", "3/2"), 2, "give it as 2/4"),
        ((model, "-f", text, "-o", tmp_path / "t", "--engine", "slurm"), 2, "'local', 'ray'"),
        ((tmp_path / "no.gguf", "-f", text, "-o", tmp_path / "t"), 1, "no such teacher"),
        ((text, "-f", text, "-o", tmp_path / "t"), 1, "this is not a GGUF file"),
        ((model, "-f", text, "-o", tmp_path / "t", "--device", "cuda"), 1, "--device is for checkpoints"),
        ((model, "-f", tmp_path / "no.txt", "-o", tmp_path / "t"), 1, "no such file"),
        ((model, "-f", text, "-o", text), 1, "this is not a folder"),
        ((model, "-f", text, "-o", tmp_path / "none" / "t"), 1, "no such folder"),
    ):
        refused(run_here("distill", "collect", *arguments), message, code)
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_killed_run_loses_one_shard_at_most(folder: Path, tmp_path: Path) -> None:
    words = ("distill", "collect", folder / "model.gguf", "-f", folder / "lines.jsonl", "-t", 1, "--shard-bytes", 3000)
    process = start(*words, "-o", tmp_path / "t")
    wait_until(lambda: len(list((tmp_path / "t").glob("*.safetensors"))) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.safetensors")}
    done = run(*words, "-o", tmp_path / "t", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["shards"]["kept"] == len(kept)
    assert facts["shards"]["made"] > 0
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "t").iterdir()}.items()
    run(*words, "-o", tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == names
    for name in names:
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_export_and_import(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    model, text = folder / "model.gguf", folder / "text.txt"
    assert run("distill", "collect", model, "-f", text, "-o", tmp_path / "t", "-t", 1, "-q").returncode == 0
    out = run("distill", "export", tmp_path / "t", "-o", tmp_path / "kit")
    assert (out.returncode, out.stderr) == (0, "")
    assert f"{tmp_path / 'kit'}: " in out.stdout
    back = run("distill", "import", tmp_path / "kit", "--tokenizer", model, "-o", tmp_path / "back")
    assert (back.returncode, back.stderr) == (0, "")
    ours, theirs = open_targets(tmp_path / "t"), open_targets(tmp_path / "back")
    assert ours.manifest.tokenizer_sha256 == theirs.manifest.tokenizer_sha256
    assert (len(ours), ours.tokens, ours.entries) == (len(theirs), theirs.tokens, theirs.entries)
    refused(run("distill", "import", folder, "-o", tmp_path / "x"), "compression_config.yaml is missing")
    refused(run("distill", "export", folder, "-o", tmp_path / "x"), "holds no soft targets")


def test_generate(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    words = ("distill", "generate", folder / "model.gguf", "-f", tmp_path / "p.jsonl", "-t", 1, "--temperature", 0)
    done = run(*words, "-o", tmp_path / "c.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'c.jsonl'}: ")
    assert " answers to 1 prompts; thrown away: " in done.stdout
    refused(run(*words, "-o", tmp_path / "c.jsonl"), "file exists")
    refused(run(*words[:4], folder / "text.txt", "-o", tmp_path / "d.jsonl"), "line 1 asks nothing")
