"""Evaluation: every number against float64 and one token at a time; llama-perplexity itself where it is installed."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_model import vocabulary, write_tiny_model

from gguforge.quant.blocks import decode, encode
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.imatrix import ImportanceMatrix, write_imatrix
from gguforge.quant.reader import read_gguf
from gguforge.runtime.divergence import Positions, compare, measure, perplexity, quantile, summarize
from gguforge.runtime.evaluate import Evaluation, evaluate
from gguforge.runtime.forward import Forward
from gguforge.runtime.library import library, load_model, new_context
from gguforge.runtime.logit_files import compare_packed, pack, read_logit_file, unpack
from gguforge.runtime.overlap import find_calibration, fingerprint, shared

CHUNK = 32


@pytest.fixture(scope="module")
def coarse_path(random_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with its matrices through Q4_0 and back: another model with the same vocabulary."""
    data = bytearray(random_path.read_bytes())
    file = read_gguf(random_path)
    for tensor in file.tensors:
        if len(tensor.shape) == 2:
            rows = file.source(tensor).rows(0, tensor.shape[0])
            coarse = decode(encode(rows, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
            data[tensor.offset : tensor.offset + tensor.nbytes] = coarse.astype("<f4").tobytes()
    path = tmp_path_factory.mktemp("coarse") / "coarse.gguf"
    path.write_bytes(data)
    return path


def run(model: Path, text: Path | None, **given: Any) -> Evaluation:
    return evaluate(model, text, **{"context": CHUNK, "threads": 1} | given)


def log_probabilities(model: Path, tokens: np.ndarray) -> np.ndarray:
    """Of every next token, float64, shape (chunks, tokens, vocabulary); one token is evaluated at a time."""
    llama, found = library(), []
    loaded = load_model(model)
    context = new_context(loaded, model, context=tokens.shape[1], threads=1)
    for chunk in tokens.tolist():
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for token in [vocabulary([]).index("<s>"), *chunk[1:]]:
            assert llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)) == 0
            row = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (len(vocabulary([])),))
            found.append(row.astype(np.float64))
    llama.llama_free(context)
    llama.llama_model_free(loaded)
    x = np.array(found).reshape(*tokens.shape, -1)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def cut(model: Path, text: Path) -> np.ndarray:
    with Forward.open(model, chunk=CHUNK, outputs=1, threads=1) as forward:
        tokens = forward.tokenize(text.read_bytes().removesuffix(b"\n"))
    return tokens[: len(tokens) // CHUNK * CHUNK].reshape(-1, CHUNK)


def test_every_number_one_token_at_a_time(random_path: Path, coarse_path: Path, text: Path) -> None:
    tokens = cut(random_path, text)
    p, q = log_probabilities(random_path, tokens), log_probabilities(coarse_path, tokens)
    here, true = slice(CHUNK // 2, CHUNK - 1), tokens[:, CHUNK // 2 + 1 :, None]
    p, q = p[:, here], q[:, here]
    nll_p, nll_q = (-np.take_along_axis(x, true, axis=2).ravel() for x in (p, q))
    kld = (np.exp(p) * (p - q)).sum(axis=2).ravel()
    same, change = (p.argmax(axis=2) == q.argmax(axis=2)).ravel(), np.exp(-nll_q) - np.exp(-nll_p)
    count = len(kld)
    found = run(coarse_path, text, against=random_path)
    both = found.comparison
    assert both is not None
    assert (found.chunks, found.context, found.positions) == (len(tokens), CHUNK, count)
    for got, value, error in (
        (found.perplexity, np.exp(nll_q.mean()), np.exp(nll_q.mean()) * nll_q.std() / math.sqrt(count - 1)),
        (both.base_perplexity, np.exp(nll_p.mean()), np.exp(nll_p.mean()) * nll_p.std() / math.sqrt(count - 1)),
        (both.log_ratio, (nll_q - nll_p).mean(), (nll_q - nll_p).std() / math.sqrt(count - 1)),
        (both.mean, kld.mean(), kld.std() / math.sqrt(count - 1)),
        (both.same_top, same.mean(), same.std() / math.sqrt(count - 1)),
        (both.mean_change, change.mean(), change.std() / math.sqrt(count - 1)),
    ):
        assert (got.value, got.error) == pytest.approx((value, error), rel=1e-3, abs=1e-6)
    assert both.rms_change.value == pytest.approx(math.sqrt((change**2).mean()), rel=1e-3)
    assert both.correlation == pytest.approx(np.corrcoef(nll_p, nll_q)[0, 1], abs=1e-4)
    for share, got in both.quantiles.items():
        assert got.value == pytest.approx(np.quantile(kld, share), rel=1e-2)
    assert both.mean.value > 1e-3, "the models must differ for this to say anything"
    assert 0 < both.same_top.value < 1


def test_a_model_is_no_different_from_itself(random_path: Path, text: Path) -> None:
    both = run(random_path, text, against=random_path).comparison
    assert both is not None
    assert (both.log_ratio.value, both.same_top.value, both.rms_change.value) == (0, 1, 0)
    assert abs(both.mean.value) < 1e-9
    assert both.quantiles[1.0].value < 1e-6


def test_several_batches_give_what_one_gives(random_path: Path, text: Path) -> None:
    """700 tokens: scored from 350, over the border of the first batch of 512."""
    tokens = None
    with Forward.open(random_path, chunk=700, outputs=512, threads=1) as forward:
        tokens = forward.tokenize(text.read_bytes())[:700]
        parts = [(start, logits.copy()) for start, logits in forward.read(tokens, 350, 699)]
    assert [(start, len(logits)) for start, logits in parts] == [(350, 162), (512, 187)]
    found = measure(np.concatenate([logits for _, logits in parts]), tokens[351:])
    assert run(random_path, text, context=700, chunks=1).perplexity == perplexity(found.surprise)


def test_a_file_of_log_probabilities_stands_for_its_model(
    random_path: Path, coarse_path: Path, text: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.kld"
    whole = run(random_path, text, save_base=base)
    assert whole.perplexity == run(random_path, text).perplexity
    with pytest.raises(OutputError, match="file exists"):
        run(random_path, text, save_base=base)
    direct, packed = run(coarse_path, text, against=random_path), run(coarse_path, None, against=base, context=9)
    assert packed.perplexity == direct.perplexity
    assert packed.context == CHUNK
    assert direct.comparison is not None
    assert packed.comparison is not None
    assert packed.comparison.mean.value == pytest.approx(direct.comparison.mean.value, rel=1e-3)
    assert packed.comparison.base_perplexity.value < whole.perplexity.value, "the format cuts off at 16 nats"
    assert packed.comparison.same_top.value == pytest.approx(direct.comparison.same_top.value, abs=0.01)
    assert run(coarse_path, text, against=base, chunks=2).chunks == 2


def test_rows_of_the_file_by_hand() -> None:
    """Step, lowest log-probability, then the steps; what is more than 16 below the top is cut off."""
    logits = np.array([[0.0, -1.0, -100.0], [5.0, 5.0, 5.0]], np.float32)
    rows = pack(logits)
    assert rows.shape == (2, 8)
    step, lowest = struct.unpack("<ff", rows[0, :4].tobytes())
    total = math.log(1 + math.exp(-1))
    assert (step, lowest) == (pytest.approx(16 / 65535), pytest.approx(-16 - total))
    assert rows[0, 4:].tolist() == [65535, round(15 / 16 * 65535), 0, 0]
    assert rows[1].tolist()[:2] == [0, 0]
    assert unpack(rows, 3)[1].tolist() == pytest.approx([math.log(1 / 3)] * 3)


scores = arrays(np.float32, (3, 9), elements=st.floats(-30, 30, width=32))


@settings(max_examples=100, deadline=None)
@given(q=scores, p=scores)
@example(q=np.zeros((3, 9), np.float32), p=np.eye(3, 9, dtype=np.float32) * np.float32(1.1e-35))
def test_divergence_of_any_scores(q: np.ndarray, p: np.ndarray) -> None:
    targets = np.array([0, 4, 8], np.int32)
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p.astype(float), q.astype(float)))
    wanted = (np.exp(log_p) * (log_p - log_q)).sum(1)
    found = compare(q, p, targets)
    assert found.divergence == pytest.approx(wanted, abs=2e-5)
    assert found.surprise == pytest.approx(-log_q[[0, 1, 2], targets], abs=1e-5)
    assert (found.divergence >= 0).all()
    packed = compare_packed(q, pack(p), targets)
    near = log_p > log_p.max(1, keepdims=True) - 15.9
    assert packed.divergence[near.all(1)] == pytest.approx(wanted[near.all(1)], abs=2e-2)


def test_quantiles_have_errors_of_rank() -> None:
    ordered = np.arange(10_001.0)
    median = quantile(ordered, 0.5)
    assert median.value == 5000
    assert median.error == pytest.approx(50, abs=1)  # sqrt(n / 4) ranks
    assert quantile(ordered, 1.0).value == 10_000
    assert quantile(np.array([3.0]), 0.99) == quantile(np.array([3.0]), 0.5)


def test_one_position_has_no_error() -> None:
    one = Positions(np.array([1.0]), np.array([1.5]), np.array([0.1]), np.array([True]))
    both = summarize(one)
    assert (both.mean.value, both.mean.error, both.same_top.value, both.same_top.error) == (0.1, 0, 1, 0)


def test_references_that_do_not_fit(random_path: Path, text: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", answer=("▁quite", "▁different"), random=True)
    with pytest.raises(InputError, match="cuts the text into other tokens"):
        run(random_path, text, against=other)
    base = tmp_path / "base.kld"
    run(random_path, text, save_base=base, chunks=2)
    with pytest.raises(InputError, match="has another vocabulary"):
        run(other, None, against=base)
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("something else entirely, and then some. " * 20, encoding="utf-8")
    with pytest.raises(InputError, match="was made from another text"):
        run(random_path, elsewhere, against=base)


def test_damaged_files_of_log_probabilities(random_path: Path, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    run(random_path, text, save_base=base, chunks=2)
    data = base.read_bytes()
    for damaged, message in (
        (data[:-1], "cut short or damaged"),
        (data + b"x", "cut short or damaged"),
        (data[:15], "no file of log-probabilities"),
        (data[:8] + struct.pack("<iii", -1, 5, 5) + data[20:], "sizes make no sense"),
        (data[:8] + struct.pack("<iii", 2**31 - 1, 2**31 - 1, 2**31 - 1) + data[20:], "cut short or damaged"),
        (data[:20] + struct.pack("<i", 10**6) + data[24:], "tokens are not in its vocabulary"),
    ):
        base.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            read_logit_file(base)


def test_refusals(random_path: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a chunk is too short"):
        run(random_path, text, context=3)
    with pytest.raises(InputError, match="the text is too short"):
        run(random_path, text, context=100_000 // 8)
    with pytest.raises(InputError, match="no text was given"):
        run(random_path, None)


def test_ctrl_c_leaves_nothing(random_path: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, value: float) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(random_path, text, save_base=tmp_path / "base.kld", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_overlap_is_found_wherever_the_passage_stands(random_path: Path, text: Path) -> None:
    everything = fingerprint(text.read_text(encoding="utf-8"))
    assert run(random_path, text, calibration=everything).overlap > 0.9
    assert run(random_path, text, calibration=fingerprint("nothing of it " * 500)).overlap == 0
    assert run(random_path, text).overlap is None
    assert shared(frozenset(), everything) == 0


def test_calibration_is_found_beside_the_model(tmp_path: Path) -> None:
    key = "quantize.imatrix"
    model = _model_with(tmp_path / "m.gguf", {f"{key}.file": r"C:\made\there\i.gguf", f"{key}.dataset": "a/wiki.txt"})
    found = find_calibration(model)
    assert found is not None
    assert (found.datasets, found.fingerprint) == ({"wiki.txt"}, frozenset())
    matrix = ImportanceMatrix({}, ("b/code.txt",), 0, 512, ("x",), frozenset({1, 2}))
    write_imatrix(matrix, tmp_path / "given.gguf")
    with pytest.raises(InputError, match="is not an importance matrix"):
        find_calibration(model, tmp_path / "given.gguf")  # it holds no tensor
    (tmp_path / "i.gguf").write_bytes(b"damaged")
    assert find_calibration(model) == found
    assert find_calibration(_model_with(tmp_path / "plain.gguf", {})) is None
    tuned = find_calibration(_model_with(tmp_path / "t.gguf", {"gguforge.calibration.sha256": "ab"}))
    assert tuned is not None
    assert tuned.hashes == {"ab"}


def _model_with(path: Path, keys: dict[str, str]) -> Path:
    from gguforge.quant.metadata import string
    from gguforge.quant.plan import Plan

    path.write_bytes(Plan({key: string(value) for key, value in keys.items()}, ()).header)
    return path


@pytest.mark.skipif(shutil.which("llama-perplexity") is None, reason="llama-perplexity is not installed")
def test_against_llama_perplexity(random_path: Path, coarse_path: Path, text: Path, tmp_path: Path) -> None:
    def theirs(model: Path, *more: object) -> str:
        words = ["llama-perplexity", "-m", model, "-f", text, "-c", CHUNK, "-b", CHUNK, "-t", 1, *more]
        done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    def number(pattern: str, output: str) -> list[float]:
        match = re.search(pattern + r"\D*([\d.]+) (?:\+/-|±) +([\d.]+)", output)
        assert match is not None, output
        return [float(match[1]), float(match[2])]

    base = tmp_path / "base.kld"
    output = theirs(random_path, "--kl-divergence-base", base)
    whole = run(random_path, text, save_base=tmp_path / "ours.kld")
    assert number("Final estimate: PPL = ", output) == pytest.approx(list(vars(whole.perplexity).values()), rel=1e-4)
    mine, other = (np.frombuffer(path.read_bytes(), np.uint8) for path in (tmp_path / "ours.kld", base))
    assert mine.shape == other.shape
    assert (mine != other).mean() < 1e-3  # the last bit of some steps
    output = theirs(coarse_path, "--kl-divergence-base", base, "--kl-divergence")
    row = re.findall(r"^ *\d+ +\d.*%$", output, re.MULTILINE)[-1]  # it loses its last lines now and then when it ends
    chunks, *numbers = map(float, re.findall(r"-?[\d.]+", row))
    found = run(coarse_path, None, against=base, chunks=int(chunks))
    both = found.comparison
    assert both is not None
    shares = [100 * number for estimate in (both.rms_change, both.same_top) for number in vars(estimate).values()]
    ours = [number for e in (found.perplexity, both.log_ratio, both.mean) for number in vars(e).values()]
    assert numbers == pytest.approx([*ours, *shares], rel=1e-3, abs=6e-4)
