"""Tuning: blocks run alone give what they give in the model, and the tuned file says more of what the model says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from block_model import INNER, WIDTH, write_block_model, write_text

from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write
from gguforge.runtime import tune as tune_module
from gguforge.runtime.blocks import BlockRunner, block_plan
from gguforge.runtime.evaluate import evaluate
from gguforge.runtime.overlap import find_calibration, fingerprint, shared
from gguforge.runtime.tune import tune
from gguforge.runtime.tuning_forecast import forecast_tuning
from gguforge.runtime.tuning_text import proof_chunks, random_chunks, tuning_chunks, tuning_metadata


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_block_model(tmp_path_factory.mktemp("blocks") / "model.gguf")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For tuning and for measuring."""
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "tuning.txt", 1), write_text(folder / "held-out.txt", 2)


@pytest.fixture(scope="module")
def chunks(model: Path, texts: tuple[Path, Path]) -> np.ndarray:
    """12 of 128 tokens."""
    found = tuning_chunks(model, texts[0], 3)
    assert found.shape == (3, 512)
    assert len(set(found[:, 0])) == 1
    return found.reshape(12, 128)


def planned(model: Path, preset: str = "Q2_K") -> Plan:
    return retype(plan_of_file(read_gguf(model)), preset)


def tuned_bytes(plan: Plan, output: Path) -> bytes:
    write(plan, output, workers=1, overwrite=True)
    return output.read_bytes()


def test_texts_do_not_overlap(texts: tuple[Path, Path]) -> None:
    one, other = (fingerprint(path.read_text()) for path in texts)
    assert one
    assert shared(one, other) == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_block_alone_gives_what_it_gives_in_the_model(
    number: int, model: Path, chunks: np.ndarray, tmp_path: Path
) -> None:
    settings = {"chunk": chunks.shape[1], "threads": 1}
    plan = plan_of_file(read_gguf(model))
    write(block_plan(plan, number), tmp_path / "block.gguf", workers=1)
    inputs = chunks[0]
    if number:
        with BlockRunner(model, layer=0, head=False, width=0, **settings) as before:
            inputs = before.run(chunks[0], output=True).output
    with BlockRunner(model, layer=number, head=False, width=0, **settings) as whole:
        wanted = whole.run(chunks[0], output=True).output
    with BlockRunner(tmp_path / "block.gguf", layer=0, head=True, width=WIDTH * number, **settings) as alone:
        found = alone.run(inputs, output=True).output
        stages = alone.survey(inputs)
        last = alone.run(inputs, stages[3])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    kinds = [{name.split(".")[-2] for name in stage.names} for stage in stages]
    assert kinds[:4] == [{"attn_q", "attn_k", "attn_v"}, {"attn_output"}, {"ffn_gate", "ffn_up"}, {"ffn_down"}]
    assert kinds[4:] == [{"output"}] * number
    assert [len(stage.summed) for stage in stages[:4]] == [0, 1, 0, 1]
    assert last.inputs.shape == (len(chunks[0]), INNER)
    np.testing.assert_array_equal(last.sums["blk.0.ffn_down.weight"], found)


def test_the_tuned_model_is_nearer_to_the_original(
    model: Path, texts: tuple[Path, Path], chunks: np.ndarray, tmp_path: Path
) -> None:
    plan = planned(model)
    divergence = {}
    for name, made in {
        "exact": plan,
        "high": tune(plan, chunks, tmp_path / "high.tune", sequential=False, threads=1),
        "best": tune(plan, chunks, tmp_path / "best.tune", threads=1),
    }.items():
        assert made.header == plan.header
        write(made, tmp_path / f"{name}.gguf", workers=1)
        found = evaluate(tmp_path / f"{name}.gguf", texts[1], against=model, threads=1, context=128, chunks=6)
        assert found.comparison is not None
        divergence[name] = found.comparison.mean.value
    assert divergence["high"] < 0.75 * divergence["exact"]
    assert divergence["best"] < 0.5 * divergence["exact"]


def test_where_blocks_cannot_stand_alone_the_whole_model_is_run(
    model: Path, chunks: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(model)
    alone = tuned_bytes(tune(plan, chunks[:2, :32], tmp_path / "a.tune", threads=1), tmp_path / "a.gguf")
    monkeypatch.setattr(tune_module, "ALIKE", -1.0)
    whole = tune(plan, chunks[:2, :32], tmp_path / "b.tune", threads=1)
    files = [read_gguf(tmp_path / folder / "present.gguf") for folder in ("a.tune", "b.tune")]
    assert [file.metadata["llama.block_count"].value for file in files] == [1, 2]
    assert tuned_bytes(whole, tmp_path / "b.gguf") == alone


def test_a_stopped_run_is_resumed_to_the_same_bytes(model: Path, chunks: np.ndarray, tmp_path: Path) -> None:
    plan, calls = planned(model), []

    def stop_at(last: int) -> object:
        def progress(done: int, total: int) -> None:
            calls.append(done)
            if len(calls) == last:
                raise KeyboardInterrupt

        return progress

    wanted = tuned_bytes(
        tune(plan, chunks[:2, :32], tmp_path / "a.tune", progress=stop_at(0), threads=1), tmp_path / "a"
    )
    steps = len(calls)
    for last in (3, 11):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            tune(plan, chunks[:2, :32], tmp_path / "b.tune", progress=stop_at(last), threads=1)
    calls.clear()
    resumed = tune(plan, chunks[:2, :32], tmp_path / "b.tune", progress=stop_at(0), threads=1)
    assert 0 < len(calls) < steps - 10
    assert tuned_bytes(resumed, tmp_path / "b") == wanted


def test_what_another_run_left_is_not_used(model: Path, chunks: np.ndarray, tmp_path: Path) -> None:
    tune(planned(model, "Q3_K_S"), chunks[:1, :32], tmp_path / "a.tune", threads=1)
    old = (tmp_path / "a.tune" / "progress.json").read_text()
    tune(planned(model, "Q4_K_S"), chunks[:1, :32], tmp_path / "a.tune", threads=1)
    assert (tmp_path / "a.tune" / "progress.json").read_text() != old


def test_a_folder_of_somebody_else_is_left_alone(model: Path, chunks: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="in the way"):
        tune(planned(model), chunks[:1, :32], tmp_path / "mine", threads=1)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_the_text_is_named_in_the_model(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    plan = retype(plan_of_file(read_gguf(model)), "Q8_0", metadata=tuning_metadata(texts[0], 4))
    write(plan, tmp_path / "a.gguf", workers=1)
    found = find_calibration(tmp_path / "a.gguf")
    assert found is not None
    assert found.datasets == {"tuning.txt"}


def test_without_a_text_the_vocabulary_is_read(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    chunks = random_chunks(model)
    assert chunks.shape == (8, 512)
    np.testing.assert_array_equal(chunks, random_chunks(model))
    kinds = read_gguf(model).metadata["tokenizer.ggml.token_type"].value
    assert {kinds[token] for token in chunks[:, 1:].flat} == {1}
    plan = planned(model)
    divergence = {}
    for name, made in {
        "exact": plan,
        "high": tune(plan, chunks[:3], tmp_path / "a.tune", sequential=False, guided=True, threads=1),
    }.items():
        write(made, tmp_path / f"{name}.gguf", workers=1)
        found = evaluate(tmp_path / f"{name}.gguf", texts[1], against=model, threads=1, context=128, chunks=6)
        assert found.comparison is not None
        divergence[name] = found.comparison.mean.value
    assert divergence["high"] < 0.9 * divergence["exact"]


def test_the_end_of_a_long_text_is_kept_from_tuning(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "long.txt", 3, words=20_000)
    skip, chunks = proof_chunks(model, text)
    assert 1 <= chunks <= 8
    assert len(tuning_chunks(model, text)) == skip
    assert proof_chunks(model, write_text(tmp_path / "short.txt", 3))[1] == 0


def test_a_forecast_is_of_the_right_size(model: Path, chunks: np.ndarray, tmp_path: Path) -> None:
    plan = planned(model)
    told = forecast_tuning(plan, chunks[:4], threads=1)
    start = time.perf_counter()
    tune(plan, chunks[:4], tmp_path / "a.tune", threads=1)
    taken = time.perf_counter() - start
    assert taken / 8 < told.seconds < 8 * taken  # other programs run too
    assert 200 << 20 < told.memory < 1 << 30
    assert told.disk > plan.size


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(InputError, match="too short"):
        tuning_chunks(model, tmp_path / "short.txt")
