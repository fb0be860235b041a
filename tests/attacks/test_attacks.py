"""Every attack is decided as its verdict says: quickly, in little memory, by an error of our own, in one line."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from cases import CASES, CUTS, WHOLE, Case

from gguforge.quant.errors import GGUFError
from gguforge.quant.reader import read_gguf

SECONDS, BYTES = 0.05, 50 << 20


def decide(path: Path) -> bool:
    """Whether the reader accepts the file; when not, it says so in one line of its own."""
    try:
        read_gguf(path)
    except GGUFError as error:
        line = str(error)
    else:
        return True
    assert line.isprintable()
    assert line.startswith(f"{path}: ")
    return False


def cost(path: Path) -> tuple[float, int]:
    """Seconds (best of three) and peak bytes of one decision."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        decide(path)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    try:
        decide(path)
        return min(seconds), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attack(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "attack.gguf"
    path.write_bytes(case.data)
    assert decide(path) == case.ok, case.verdict
    seconds, peak = cost(path)
    assert seconds < SECONDS
    assert peak < BYTES


def test_a_file_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(WHOLE)
    assert decide(path)
    for case in CUTS:
        path.write_bytes(case.data)
        assert not decide(path), case.name


def test_libggml_agrees_or_the_case_says_why(tmp_path: Path) -> None:
    everything = (*CASES, *CUTS, Case("whole", "accepted", WHOLE, ok=True))
    paths = [tmp_path / f"{number}.gguf" for number in range(len(everything))]
    for path, case in zip(paths, everything, strict=True):
        path.write_bytes(case.data)
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("ask_ggml.py")],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # libggml prints names as they are
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    answers = [answer == "yes" for answer in child.stdout.split()]
    wanted = [case.ok if case.ggml is None else case.ggml for case in everything]
    wrong = [case.name for case, want, got in zip(everything, wanted, answers, strict=True) if want != got]
    assert wrong == []


def test_numbers_are_unique() -> None:
    numbers = [int(case.name.split()[0]) for case in CASES]
    assert numbers == list(range(1, len(CASES) + 1))
