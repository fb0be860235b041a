"""Calibration: the sums against ones made in another way, resuming, Ctrl-C; llama-imatrix itself where it is."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from ctypes import c_int
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from tiny_model import vocabulary, write_tiny_model

from gguforge.quant.errors import EngineError, GGUForgeError, InputError, OutputError
from gguforge.quant.imatrix import ImportanceMatrix, read_imatrix
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write
from gguforge.runtime.calibrate import calibrate, partial_path
from gguforge.runtime.chunks import read_text
from gguforge.runtime.collector import Collector, squares
from gguforge.runtime.forward import Forward
from gguforge.runtime.library import library
from gguforge.runtime.tensors import OP_OFFSET, Tensor, operation, view

WORDS = "a list of files and the user who uses them, hello there: he said it in us. "
CHUNK = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"{number} {WORDS}" for number in range(20)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def experts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, two of which each token uses."""
    folder = tmp_path_factory.mktemp("experts")
    plan = models.build(
        folder, GGMLQuantizationType.F16, layers=2, heads=4, hidden=64, ffn=96, vocabulary=300, experts=4
    )
    write(plan, folder / "experts.gguf", workers=1)
    return folder / "experts.gguf"


class Oracle:
    """Sums in float64, each matrix for itself, row by row for experts: slow, and hard to get wrong."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.callback = library().ggml_backend_sched_eval_callback(self.called)

    def called(self, address: int, ask: bool, _: object) -> bool:
        op = c_int.from_address(address + OP_OFFSET).value
        if op not in (operation("MUL_MAT"), operation("MUL_MAT_ID")):
            return not ask
        tensor = Tensor.from_address(address)
        matrix = Tensor.from_address(tensor.src[0])
        if not matrix.name.startswith((b"blk.", b"output.")) or ask:
            return True
        x = view(Tensor.from_address(tensor.src[1]), tensor.src[1], np.float32)[0].astype(np.float64)
        experts, columns = matrix.ne[2], x.shape[-1]
        sums = self.sums.setdefault(matrix.name.decode(), np.zeros((experts, columns)))
        counts = self.counts.setdefault(matrix.name.decode(), np.zeros(experts, int))
        if op == operation("MUL_MAT"):
            sums[0] += (x[0] ** 2).sum(0)
            counts[0] += len(x[0])
            return True
        ids = view(Tensor.from_address(tensor.src[2]), tensor.src[2], np.int32)[0, 0]
        for token in range(ids.shape[0]):
            for slot in range(ids.shape[1]):
                sums[ids[token, slot]] += x[token, slot % x.shape[1]] ** 2
                counts[ids[token, slot]] += 1
        return True


def oracle(model: Path, text: Path, chunk: int, chunks: int | None = None) -> Oracle:
    found = Oracle()
    with Forward.open(model, chunk=chunk, outputs=chunk, threads=1, callback=found.callback) as forward:
        for tokens in read_text(forward, text, chunks).chunks:
            assert sum(len(logits) for _, logits in forward.read(tokens, 0, len(tokens))) == chunk
    return found


def assert_equal(found: ImportanceMatrix, wanted: Oracle, *, output: bool) -> None:
    names = [name for name in wanted.sums if output or not name.startswith("output.")]
    assert sorted(found.entries) == sorted(names)
    for name in names:
        assert np.array_equal(found.entries[name].counts, wanted.counts[name]), name
        np.testing.assert_allclose(found.entries[name].sums, wanted.sums[name], rtol=1e-4, err_msg=name)


def run(model: Path, text: Path, output: Path, **settings: Any) -> ImportanceMatrix:
    """Calibrate on one thread in chunks of 64, and read what was written."""
    calibrate(model, text, output, **{"context": CHUNK, "threads": 1} | settings)
    return read_imatrix(output)


@pytest.mark.parametrize("process_output", [False, True])
def test_sums_of_a_dense_model(random_path: Path, text: Path, tmp_path: Path, process_output: bool) -> None:
    found = run(random_path, text, tmp_path / "i.gguf", chunks=5, process_output=process_output)
    assert_equal(found, oracle(random_path, text, CHUNK, 5), output=process_output)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (5, CHUNK, (str(text),))


def test_sums_of_experts(experts_path: Path, text: Path, tmp_path: Path) -> None:
    found = run(experts_path, text, tmp_path / "i.gguf")
    assert_equal(found, oracle(experts_path, text, CHUNK), output=False)
    counts = found.entries["blk.0.ffn_up_exps.weight"].counts
    assert counts.shape == (4,)
    assert counts.sum() == 2 * CHUNK * found.chunk_count


def test_chunks_of_several_batches(random_path: Path, text: Path, tmp_path: Path) -> None:
    """600 tokens are one batch of 512 and one of 88; nothing may be skipped then, later tokens look back."""
    found = run(random_path, text, tmp_path / "i.gguf", context=600, chunks=2)
    assert_equal(found, oracle(random_path, text, 600, 2), output=False)


def test_first_layer_by_hand(random_path: Path, text: Path, tmp_path: Path) -> None:
    """The first query matrix reads the normalized embeddings, every chunk's first token replaced by BOS."""
    found = run(random_path, text, tmp_path / "i.gguf", chunks=3)
    file = read_gguf(random_path)
    embedding = next(file.source(t).rows(0, t.shape[0]) for t in file.tensors if t.name == "token_embd.weight")
    with Forward.open(random_path, chunk=CHUNK, outputs=1, threads=1) as forward:
        tokens = forward.tokenize(text.read_bytes().removesuffix(b"\n"))[: 3 * CHUNK].reshape(3, CHUNK).copy()
    tokens[:, 0] = vocabulary([]).index("<s>")
    x = embedding[tokens.ravel()].astype(np.float64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found.entries["blk.0.attn_q.weight"].sums[0], (x**2).sum(axis=0), rtol=1e-5)


def test_skipping_the_rest_changes_nothing(random_path: Path, text: Path) -> None:
    found = []
    for skip in (False, True):
        collector = Collector(skip_rest=skip)
        with Forward.open(random_path, chunk=CHUNK, outputs=CHUNK, threads=1, callback=collector.callback) as forward:
            for tokens in read_text(forward, text, 3).chunks:
                collector.begin()
                list(forward.read(tokens, 0, CHUNK))
                collector.keep()
        found.append(collector.entries())
    assert list(found[0]) == list(found[1])
    for name, entry in found[0].items():
        assert np.array_equal(entry.sums, found[1][name].sums)


def test_a_stopped_run_goes_on_to_the_same_bytes(random_path: Path, text: Path, tmp_path: Path) -> None:
    run(random_path, text, tmp_path / "whole.gguf", chunks=6)

    def stop_at_three(done: int, total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    output = tmp_path / "i.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(random_path, text, output, chunks=6, progress=stop_at_three)
    assert not output.exists()
    kept = read_imatrix(partial_path(output))
    assert (kept.chunk_count, int(kept.entries["blk.0.attn_q.weight"].counts[0])) == (3, 3 * CHUNK)
    with pytest.raises(OutputError, match=r"a stopped run left this file.*--resume"):
        run(random_path, text, output, chunks=6)
    seen: list[int] = []
    run(random_path, text, output, chunks=6, resume=True, progress=lambda done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]
    assert not partial_path(output).exists()
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_more_chunks_for_a_finished_one(random_path: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "i.gguf"
    run(random_path, text, output, chunks=2)
    more = run(random_path, text, output, chunks=4, resume=True)
    whole = run(random_path, text, tmp_path / "whole.gguf", chunks=4)
    assert (more.chunk_count, more.fingerprint) == (4, whole.fingerprint)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"text": "other text " * 99}, "the text"),
        ({"context": 32}, "the chunk size"),
        ({"process_output": True}, "--process-output"),
        ({"model": "experts"}, "the model"),
    ],
)
def test_resuming_something_else_is_refused(
    change: dict[str, Any], what: str, random_path: Path, experts_path: Path, text: Path, tmp_path: Path
) -> None:
    run(random_path, text, tmp_path / "i.gguf", chunks=2)
    if other := change.pop("text", None):
        text = tmp_path / "other.txt"
        text.write_text(other, encoding="utf-8")
    model = experts_path if change.pop("model", None) else random_path
    with pytest.raises(InputError, match=f"{what} is another"):
        run(model, text, tmp_path / "i.gguf", chunks=2, resume=True, **change)


def test_refusals(random_path: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "i.gguf"
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    with pytest.raises(InputError, match=r"too short \(expected at least 64 tokens"):
        run(random_path, short, output)
    with pytest.raises(InputError, match="a chunk is too short"):
        run(random_path, text, output, context=8)
    with pytest.raises(FileNotFoundError):
        run(random_path, tmp_path / "none.txt", output)
    output.touch()
    with pytest.raises(OutputError, match="file exists"):
        run(random_path, text, output)


def test_weights_that_overflow_are_named(tmp_path: Path, text: Path) -> None:
    """Infinite inputs would make the quantizer fail much later, and without a reason."""
    path = write_tiny_model(tmp_path / "m.gguf", random=True)
    data = bytearray(path.read_bytes())
    norm = next(t for t in read_gguf(path).tensors if t.name == "blk.1.attn_norm.weight")
    data[norm.offset : norm.offset + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"tensor 'blk\.1\.attn_.*not finite"):
        run(path, text, tmp_path / "i.gguf")


def test_conversations_go_through_the_template(random_path: Path, tmp_path: Path) -> None:
    """Control tokens come from the template alone; the text that looks like one stays text."""
    messages = [{"role": "user", "content": "hello <|im_end|> there"}, {"role": "assistant", "content": "he said " * 9}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"messages": messages}, messages)), encoding="utf-8")
    with Forward.open(random_path, chunk=16, outputs=1, threads=1) as forward:
        tokens = read_text(forward, path).chunks.ravel().tolist()
    names = vocabulary([])
    first = tokens.index(names.index("<s>"))
    second = tokens.index(names.index("<s>"), first + 1)
    assert [names[token] for token in tokens if names[token].startswith("<|im")][:4] == [
        "<|im_start|>",
        "<|im_end|>",
    ] * 2
    assert tokens[second : second + 9] == tokens[:9]
    assert run(random_path, path, tmp_path / "i.gguf", context=16).chunk_count == len(tokens) // 16


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"messages": 3}', '[{"role": "user"}]', '[{"role": "user", "content": []}]']
)
def test_lines_that_are_no_conversation(line: str, random_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('\n[{"role": "user", "content": "hello"}]\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match="line 3 is no conversation"):
        run(random_path, path, tmp_path / "i.gguf")


def test_a_model_without_a_template_takes_plain_text_only(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", template=None)
    (tmp_path / "c.jsonl").write_text('[{"role": "user", "content": "hello"}]', encoding="utf-8")
    with pytest.raises(GGUForgeError, match="no chat template"):
        run(model, tmp_path / "c.jsonl", tmp_path / "i.gguf")


def test_squares_take_strided_rows() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert squares(x[::2, ::2]).tolist() == (x[::2, ::2] ** 2).sum(0).tolist()


@pytest.mark.skipif(shutil.which("llama-imatrix") is None, reason="llama-imatrix is not installed")
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_against_llama_imatrix(kind: str, random_path: Path, experts_path: Path, text: Path, tmp_path: Path) -> None:
    model = random_path if kind == "dense" else experts_path
    # -b: one chunk at a time, as here; several at once round differently, and a tie between experts may fall otherwise
    words = ["llama-imatrix", "-m", model, "-f", text, "-o", tmp_path / "theirs.gguf", "-c", CHUNK, "-b", CHUNK]
    subprocess.run([*map(str, words), "-t", "1", "--no-ppl", "--process-output"], check=True, capture_output=True)
    theirs, ours = read_imatrix(tmp_path / "theirs.gguf"), run(model, text, tmp_path / "o.gguf", process_output=True)
    assert list(theirs.entries) == list(ours.entries)
    assert (theirs.chunk_count, theirs.chunk_size, theirs.datasets) == (ours.chunk_count, CHUNK, ours.datasets)
    for name, entry in theirs.entries.items():
        assert np.array_equal(entry.counts, ours.entries[name].counts), name
        np.testing.assert_allclose(ours.entries[name].sums, entry.sums, rtol=1e-3, err_msg=name)
