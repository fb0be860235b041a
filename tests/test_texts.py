"""The texts that figures are measured on share nothing with those that models are tuned on or chosen by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with `tuning` and `held-out`, and `copied`, a part of which is from the first."""
    words = [str(number * 7919 % 10007) for number in range(4000)]
    for name, part in {"tuning": words[:2000], "held-out": words[2000:], "copied": words[1500:3500]}.items():
        (tmp_path / name).write_text(" ".join(part))
    return tmp_path


BENCHMARKS = {
    "quality.py": ["--calibration", "tuning", "--llama-imatrix", "no-such", "--llama-quantize", "no-such"],
    "size_quality.py": ["--text", "tuning"],
    "qat.py": ["--text", "tuning", "--output", "out"],
}


@pytest.mark.parametrize("script", BENCHMARKS)
def test_a_benchmark_refuses_texts_that_overlap(script: str, texts: Path) -> None:
    assert "of copied stands in tuning as well" in said(script, texts, "copied")


def test_a_benchmark_goes_on_with_texts_that_do_not(texts: Path) -> None:
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'no-such'" in said("quality.py", texts, "held-out")


def said(script: str, texts: Path, held_out: str) -> str:
    """What a benchmark ends with, which has no model to measure."""
    words = [sys.executable, BENCH / script, "no-such-model", *BENCHMARKS[script], "--held-out", held_out]
    done = subprocess.run(words, cwd=texts, check=False, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode
    return done.stderr
