"""Types for a size: within the budget to the byte, measured on text that did not choose, never worse than a preset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.quant.blocks import decode, encode
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.damage import relative_errors
from gguforge.quant.errors import InputError
from gguforge.quant.plan import TensorPlan
from gguforge.quant.quantize import plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write
from gguforge.runtime import meter, sizing
from gguforge.runtime.evaluate import evaluate
from gguforge.runtime.memory import buffers
from gguforge.runtime.sizing import Measuring, Sized, fit_size

CHUNK = 32


def measuring(text: Path, folder: Path) -> Measuring:
    return Measuring(text, context=CHUNK, chunks=4, threads=1, workers=1, store=folder / "sweep.json", scratch=folder)


@pytest.fixture(scope="module")
def budget(random_path: Path) -> int:
    return retype(plan_of_file(read_gguf(random_path)), "Q5_0").size


@pytest.fixture(scope="module")
def sized(random_path: Path, text: Path, budget: int, tmp_path_factory: pytest.TempPathFactory) -> Sized:
    return fit_size(random_path, budget, measuring(text, tmp_path_factory.mktemp("sizing")))


def test_the_file_is_as_planned_and_within_the_budget(sized: Sized, budget: int, tmp_path: Path) -> None:
    write(sized.best.plan, tmp_path / "sized.gguf", workers=1)
    assert (tmp_path / "sized.gguf").stat().st_size == sized.best.plan.size <= budget
    assert len({tensor.type for tensor in sized.chosen.plan.tensors if len(tensor.shape) > 1}) > 1, "a mix"


def test_it_is_measured_on_chunks_that_did_not_choose(
    sized: Sized, random_path: Path, text: Path, tmp_path: Path
) -> None:
    write(sized.chosen.plan, tmp_path / "sized.gguf", workers=1)
    held_out = evaluate(
        tmp_path / "sized.gguf", text, against=random_path, context=CHUNK, chunks=4, skip=4, threads=1
    ).comparison
    assert held_out is not None
    assert held_out.mean.value == pytest.approx(sized.chosen.divergence, rel=0.05), "16 bits a log-probability"


def test_never_worse_than_a_preset_that_fits(sized: Sized, budget: int) -> None:
    assert sized.rivals
    assert all(rival.plan.size <= budget for rival in sized.rivals)
    assert sized.best.divergence <= min(rival.divergence for rival in sized.rivals)


def test_a_preset_that_is_better_is_taken(
    random_path: Path, text: Path, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worst(options: dict[str, list[Any]], budget: int) -> dict[str, Any]:
        return {name: max(some, key=lambda option: option.damage) for name, some in options.items()}

    monkeypatch.setattr(sizing, "allocate", worst)
    found = fit_size(random_path, budget, measuring(text, tmp_path))
    assert found.best.name in {rival.name for rival in found.rivals}
    assert found.best.divergence < found.chosen.divergence


def test_a_stopped_sweep_goes_on(
    random_path: Path, text: Path, budget: int, sized: Sized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    real = meter.Meter.evaluation

    def counted(self: meter.Meter, plan: Any) -> Any:
        evaluated.append(1)
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        return real(self, plan)

    monkeypatch.setattr(meter.Meter, "evaluation", counted)
    how = measuring(text, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit_size(random_path, budget, how)
    assert len(json.loads(how.store.read_text())["divergence"]) == 3
    again = fit_size(random_path, budget, how)
    assert [tensor.type for tensor in again.chosen.plan.tensors] == [t.type for t in sized.chosen.plan.tensors]
    matrices = sum(tensor.type is not T.F32 for tensor in sized.chosen.plan.tensors)
    assert len(evaluated) == 4 + (matrices - 3) + 1 + len(again.rivals), "the three were not measured again"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.json"]
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    evaluated[:] = [1] * 4  # no more interruption
    fit_size(random_path, budget, replace(how, text=copy))
    assert len(evaluated) == 4 + 1 + len(again.rivals), "a copy is the same text"


def test_another_text_is_another_sweep(random_path: Path, text: Path, budget: int, tmp_path: Path) -> None:
    how = measuring(text, tmp_path)
    how.store.write_text(json.dumps({"of": "another", "divergence": {"token_embd.weight": 1e9}}))
    assert fit_size(random_path, budget, how).chosen.divergence < 1
    assert json.loads(how.store.read_text())["divergence"]["token_embd.weight"] < 1


def test_too_few_bytes_are_refused(random_path: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit.*expected at least"):
        fit_size(random_path, 1000, measuring(text, tmp_path))


def test_errors_are_those_of_the_encoders() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 256), np.float32)
    weights = np.linspace(0, 2, 256, dtype=np.float32)[None]
    tensor = TensorPlan("x", rows.shape, T.F16, ArraySource(rows), importance=weights)
    found = relative_errors(tensor, [T.Q2_K, T.Q8_0])
    for kind, error in found.items():
        difference = rows - decode(encode(rows, kind, weights[0]), kind)
        assert error == pytest.approx(np.sum(weights * difference**2) / np.sum(weights * rows**2), rel=1e-5)
    assert found[T.Q8_0] < found[T.Q2_K] < 1
    alone = TensorPlan("x", (6, 96), T.F16, ArraySource(np.ascontiguousarray(rows[:, :96])))
    assert list(relative_errors(alone, [T.Q2_K, T.IQ2_XS, T.Q4_0])) == [T.Q4_0], "rows no block divides, no importance"


def test_memory_is_what_llama_cpp_says(random_path: Path) -> None:
    """2 layers of 32 keys and as many values, float16, for each token; llama.cpp's log rounds to 0.01 MiB."""
    small, large = buffers(random_path, 1024), buffers(random_path, 4096)
    assert large.cache == pytest.approx(4096 * 2 * (32 + 32) * 2, abs=0.01 * 2**20)
    assert small.cache == pytest.approx(large.cache / 4, abs=0.01 * 2**20)
    assert large.compute > 0
