"""Stopping a long run and going on, through the installed command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import models
import pytest
from running import COMMAND, linux, refused, run, wait_until

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.writer import write

HASTE = """
from gguforge.quant import following, slabs
following.RECORD_SECONDS, slabs.ENCODE_SLAB = 0, 1 << 14
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m-F16.gguf"
    write(models.build(path.parent, T.F16, layers=8), path, workers=1)
    return path


@pytest.fixture
def hasty(tmp_path: Path) -> dict[str, str]:
    """An environment in which every run counts as long: each slab is recorded."""
    (tmp_path / "sitecustomize.py").write_text(HASTE)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@linux
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, None), (signal.SIGHUP, 129, None)],
)
def test_a_stopped_run_says_what_it_keeps_and_goes_on(
    number: signal.Signals, code: int, line: str | None, model: Path, hasty: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    journal = tmp_path / "m.gguf.part.journal"
    words = [*COMMAND, "quantize", str(model), "-t", "Q2_K", "-o", str(out), "--workers", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, encoding="utf-8", env=hasty, start_new_session=True)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 3, process)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    *lines, note = errors.split("\n")[:-1]
    assert [word for word in lines if word] == ([] if line is None else [line])
    kept = re.fullmatch(
        re.escape(f"{out}.part keeps ") + r"(\d+ of 75 tensors): the same command goes on from there\.", note
    )
    assert kept is not None, note
    assert not out.exists()
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == f"resuming: {kept[1]} are done\n"
    assert not journal.exists()
    assert run("quantize", model, "-t", "Q2_K", "-o", tmp_path / "again.gguf").returncode == 0
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    receipt = Path(f"{out}.json").read_bytes()
    assert receipt == (tmp_path / "again.gguf.json").read_bytes()
    errors = [tensor["relative_error"] for tensor in json.loads(receipt)["tensors"]]
    assert sum(error > 0 for error in errors) == 58


@linux
def test_nohup_is_respected(model: Path, hasty: dict[str, str], tmp_path: Path) -> None:
    words = [*COMMAND, "quantize", str(model), "-t", "Q2_K", "-o", str(tmp_path / "m.gguf"), "--workers", "2"]
    process = subprocess.Popen(
        words, env=hasty, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_until((tmp_path / "m.gguf.part.journal").exists, process)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(30) == 0
    assert (tmp_path / "m.gguf").exists()


def test_a_file_in_the_way_is_kept(model: Path, tmp_path: Path) -> None:
    part = tmp_path / "m.gguf.part"
    part.write_text("precious")
    refused(
        run("quantize", model, "-t", "Q8_0", "-o", tmp_path / "m.gguf"),
        "this file is in the way: it is no part file of ours",
    )
    assert part.read_text() == "precious"


def test_the_cache_from_the_command_line(model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-t", "Q2_K", "--cache", tmp_path / "cache")
    first = run(*words, "-o", tmp_path / "1.gguf", "--cache-size", "1G")
    assert first.stdout.endswith(" s, 0 of 58 tensors from the cache\n"), first.stdout
    second = run(*words, "-o", tmp_path / "2.gguf")
    assert second.stdout.endswith(" s, 58 of 58 tensors from the cache\n"), second.stdout
    changed = run(*words, "-o", tmp_path / "3.gguf", "--output-tensor-type", "Q8_0", "--json")
    assert json.loads(changed.stdout)["cached_tensors"] == 57
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    refused(run(*words, "-o", tmp_path / "4.gguf", "--cache-size", "much"), "'much' is no size")
