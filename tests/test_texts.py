"""The texts that figures are measured on share nothing with those that models are tuned on or chosen by."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """bench/quality.py."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_quality", BENCH / "quality.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_quality"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def test_the_benchmark_sees_an_overlap(quality: ModuleType, tmp_path: Path) -> None:
    words = [str(number * 7919 % 10007) for number in range(4000)]
    for name, part in {"tuning": words[:2000], "held-out": words[2000:], "copied": words[1500:3500]}.items():
        (tmp_path / name).write_text(" ".join(part))
    assert quality.overlap(tmp_path / "held-out", tmp_path / "tuning") == 0
    assert 0.1 < quality.overlap(tmp_path / "copied", tmp_path / "tuning") < 0.5
