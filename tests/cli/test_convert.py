"""`gguforge convert` as a user meets it: output, exit codes, one-line errors, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import running
from checkpoints import LLAMA, SMALL_K, Case, build
from running import refused, run_here

from gguforge.cli.main import main
from gguforge.convert import convert
from gguforge.quant.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from gguforge.quant.quantize import Guide, quantize
from gguforge.quant.reader import read_gguf


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return running.run("convert", *words, cwd=cwd)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return build(Case(LLAMA), tmp_path)


def test_a_preset_in_one_pass(tmp_path: Path) -> None:
    folder = build(Case(SMALL_K), tmp_path)
    done = run(folder, "--type", "q4_k_m", "-o", tmp_path / "m.gguf", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'm.gguf'}: ")
    assert {tensor.type.name for tensor in read_gguf(tmp_path / "m.gguf").tensors} >= {"Q4_K", "Q6_K", "F32"}


def test_default_type_and_name(llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    assert run(llama, "--workers", 1, "--quiet", cwd=work).stdout == ""
    name = "Tiny-103K-1m-Instruct-v0.3-BF16.gguf"
    assert [path.name for path in work.iterdir()] == [name], "a copy has no receipt"


def test_dry_run_writes_nothing_and_is_exact(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    words = (llama, "--type", "Q8_0", "-o", output, "--workers", 2)
    planned = json.loads(run(*words, "--dry-run", "--json").stdout)
    text = run(*words, "--dry-run").stdout
    assert not output.exists()
    assert f"{planned['bytes']:,} bytes" in text
    assert {"memory_bytes", "disk_free_bytes", "types"} <= planned.keys()
    written = json.loads(run(*words, "--json").stdout)
    assert planned["bytes"] == written["bytes"] == output.stat().st_size
    assert "seconds" in written


def test_fallbacks_and_warnings_go_to_stderr(tmp_path: Path) -> None:
    folder = build(Case(LLAMA | {"logit_scale": 2}), tmp_path)
    done = run(folder, "--type", "Q4_K_M", "-o", tmp_path / "m.gguf", "--workers", 1)
    assert "warning: config.json: logit_scale = 2 is not understood" in done.stderr
    assert "instead of Q4_K" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_existing_output_needs_overwrite(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    output.write_text("precious")
    refused(run(llama, "-o", output), "exists")
    assert output.read_text() == "precious"
    assert run(llama, "-o", output, "--overwrite", "--workers", 1).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such folder"),
        (["."], "config.json is missing"),
        (["{}", "--type", "Q9"], "unknown type"),
        (["{}", "--pre", "nonsense"], "'nonsense' is not known"),
        (["{}", "-o", "no/such/folder/m.gguf"], "no/such/folder"),
    ],
)
def test_bad_words_get_one_line(
    words: list[str], message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    refused(run_here("convert", *(word.format(llama) for word in words)), message)
    assert list(work.iterdir()) == []


def test_usage_errors_exit_with_2(llama: Path) -> None:
    refused(run(llama, "--workers", 0), "--workers", code=2)
    refused(run(), "CHECKPOINT", code=2)


def test_truncated_weights(llama: Path, tmp_path: Path) -> None:
    path = llama / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(run(llama, "-o", tmp_path / "m.gguf"), "file is cut short")


def test_no_permission(llama: Path, tmp_path: Path) -> None:
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(run(llama, "-o", locked / "m.gguf"), "ermission")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as only Linux does")
def test_no_space_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "m.gguf"
    output.parent.mkdir()

    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "gguforge.cli", "convert", str(llama), "-o", str(output), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert list(output.parent.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals work otherwise there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    config = SMALL_K | {"num_hidden_layers": 8, "intermediate_size": 4096}
    folder = build(Case(config), tmp_path)
    output = tmp_path / "out" / "m.gguf"
    output.parent.mkdir()
    command = [sys.executable, "-m", "gguforge.cli", "convert", str(folder), "-t", "Q3_K_M", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not any(part.stat().st_size for part in output.parent.iterdir()) and process.poll() is None:  # at work
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (130, 143, -number), errors  # Python itself ends by the signal if it comes early
    assert "Traceback" not in errors
    assert not output.exists()
    if number == signal.SIGINT:
        assert list(output.parent.iterdir()) == []


def invoke(*words: object) -> None:
    """Run the command line in this process; it must end well."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code in (0, None)


def stored(path: Path, name: str) -> bytes:
    """The bytes of a tensor."""
    found = next(tensor for tensor in read_gguf(path).tensors if tensor.name == name)
    return path.read_bytes()[found.offset : found.offset + found.nbytes]


def write_matrix(path: Path, seed: int = 0) -> Path:
    """An importance matrix of SMALL_K's layers, all numbers different."""
    entries = {}
    dice = np.random.default_rng(seed)
    for i in range(2):
        for name, width in (("attn_q", 256), ("attn_k", 256), ("attn_v", 256), ("ffn_up", 256), ("ffn_down", 512)):
            sums = dice.uniform(0.1, 9, (1, width)).astype(np.float32)
            entries[f"blk.{i}.{name}.weight"] = Entry(sums, np.array([7], np.int64))
    write_imatrix(ImportanceMatrix(entries, ("text.txt",), 7, 512), path)
    return path


@pytest.mark.parametrize(
    ("preset", "choice"),
    [("Q4_K_M", {}), ("Q2_K", {"include": ["attn"]}), ("Q3_K_S", {"exclude": ["blk.1"]})],
)
def test_an_importance_matrix_guides_one_pass_as_two(preset: str, choice: dict[str, list[str]], tmp_path: Path) -> None:
    folder, matrix = build(Case(SMALL_K), tmp_path), write_matrix(tmp_path / "imatrix.gguf")
    words = [word for name, parts in choice.items() for part in parts for word in (f"--{name}-weights", part)]
    invoke("convert", folder, "--type", preset, "--imatrix", matrix, *words, "--workers", 1, "-o", tmp_path / "1.gguf")
    convert(folder, tmp_path / "bf16.gguf", workers=1)
    guide = Guide.from_matrix(read_imatrix(matrix), str(matrix), **choice)
    quantize(tmp_path / "bf16.gguf", tmp_path / "2.gguf", preset, guide=guide, workers=1)
    quantize(tmp_path / "bf16.gguf", tmp_path / "plain.gguf", preset, workers=1)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    ours, plain = (stored(tmp_path / f"{name}.gguf", "blk.0.attn_q.weight") for name in ("1", "plain"))
    assert ours != plain


def test_a_matrix_that_does_not_belong_is_refused(llama: Path, tmp_path: Path) -> None:
    matrix, output = write_matrix(tmp_path / "imatrix.gguf"), tmp_path / "m.gguf"
    refused(run(llama, "--type", "Q4_0", "--imatrix", matrix, "-o", output), "importance matrix is of another model")
    refused(run(llama, "--imatrix", matrix, "-o", output), "an importance matrix guides no conversion to AUTO")
    refused(run(llama, "--type", "Q4_0", "--imatrix", llama / "config.json", "-o", output), "config.json")
    both = ("--include-weights", "a", "--exclude-weights", "b")
    refused(run(llama, "--type", "Q4_0", "--imatrix", matrix, *both, "-o", output), "cannot be used together", 2)
    refused(run(llama, "--type", "Q4_0", *both[:2], "-o", output), "need --imatrix", 2)
    assert not output.exists()
