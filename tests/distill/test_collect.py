"""Targets are the teacher's distributions, the same bytes however the work was divided or stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.convert.conversion import convert
from gguforge.distill import demo_model
from gguforge.distill.collect import Collected, Progress, collect
from gguforge.distill.collector import Settings, shares
from gguforge.distill.demo.lessons import read_course
from gguforge.distill.targets import open_targets
from gguforge.distill.teachers.open import TeacherSource
from gguforge.quant.errors import GGUForgeError, InputError
from gguforge.runtime.forward import Forward

SMALL = Settings(context=64, shard_bytes=1000)


def run(folder: Path, text: Path, *teachers: Path, settings: Settings = SMALL, **options: Any) -> Collected:
    return collect(
        [TeacherSource(str(teacher), threads=1) for teacher in teachers], [text], folder, settings, **options
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Path) -> Path:
    """A run from the beginning to the end, in shards; the text is one passage of several lines each."""
    folder = tmp_path_factory.mktemp("targets") / "whole"
    done = run(folder, texts(text, tmp_path_factory.mktemp("lines")), teacher)
    assert done.missing == done.kept == 0
    assert done.made >= 3
    return folder


def texts(text: Path, folder: Path) -> Path:
    """The text as a line each of a .jsonl file, so that there are several shards."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    return path


def shortened(text: Path, folder: Path) -> Path:
    """Its beginning: three documents."""
    path = folder / "short.txt"
    path.write_text(text.read_text()[:500])
    return path


def test_rows_are_what_the_teacher_expects_next(tmp_path: Path, teacher: Path, text: Path) -> None:
    """Against llama.cpp's scores of the same documents, read independently: row i is the one before token i + 1."""
    text = shortened(text, tmp_path)
    run(tmp_path / "full", text, teacher, settings=replace(SMALL, kind="full", size=0))
    run(tmp_path / "top", text, teacher, settings=replace(SMALL, kind="top-k", size=5))
    run(tmp_path / "drawn", text, teacher, settings=replace(SMALL, size=4000))
    full, top, drawn = (open_targets(tmp_path / name) for name in ("full", "top", "drawn"))
    vocabulary = full.manifest.vocabulary
    with Forward.open(teacher, chunk=64, outputs=64, threads=1) as forward:
        for document, best, sample in zip(full, top, drawn, strict=True):
            count = len(document.input_ids)
            ((_, scores),) = forward.read(document.input_ids[:-1], 0, count - 1)
            exact = scores.astype(np.float64)
            exact -= np.log(np.exp(exact).sum(1, keepdims=True))
            assert document.positions.tolist() == list(range(count - 1))
            np.testing.assert_allclose(document.weights.reshape(-1, vocabulary), np.exp(exact), rtol=1e-2, atol=1e-9)
            after = exact[np.arange(count - 1), document.input_ids[1:]]
            for read in (document, best, sample):
                np.testing.assert_allclose(read.next_log_prob, after, rtol=1e-3)
                np.testing.assert_allclose(read.lse, scores[:, 0] - exact[:, 0], rtol=1e-3)
            np.testing.assert_array_equal(best.ids.reshape(-1, 5)[:, 0], exact.argmax(1))
            np.testing.assert_allclose(np.add.reduceat(best.weights, best.row_ptr[:-1]) + best.tail, 1, rtol=2e-3)
            counts = np.zeros((count - 1, vocabulary))
            counts[np.repeat(np.arange(count - 1), np.diff(sample.row_ptr)), sample.ids] = sample.weights
            assert np.abs(counts - np.exp(exact)).max() < 2 / 4000


def test_a_teacher_knows_its_own_lessons(tmp_path: Path) -> None:
    """Its answers, word for word, are nearly certain to it; one token off they would cost several nats each."""
    convert(Path(demo_model.__path__[0]), tmp_path / "demo.gguf", type="Q8_0", warn=lambda line: None)
    lessons = [lesson for lesson in read_course().lessons if lesson.held_out][:8]
    talks = [[{"role": "user", "content": lesson.held_out[0]}, {"role": "assistant", "content": lesson.answers[0]}]
             for lesson in lessons]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    done = run(tmp_path / "t", tmp_path / "talks.jsonl", tmp_path / "demo.gguf", settings=Settings(context=256))
    assert 0 < done.rows < done.tokens
    assert done.teacher_loss < 0.3


def test_divided_among_processes_the_shards_are_the_same(
    whole: Path, tmp_path: Path, teacher: Path, text: Path
) -> None:
    lines = texts(text, tmp_path)
    first = run(tmp_path / "t", lines, teacher, shard=(1, 2))
    assert first.missing > 0
    with pytest.raises(InputError, match="shards are missing"):
        open_targets(tmp_path / "t")
    second = run(tmp_path / "t", lines, teacher, shard=(2, 2))
    assert (second.missing, first.made + second.made) == (0, first.manifest.shards)
    assert files(tmp_path / "t") == files(whole)


def test_what_is_there_is_kept_and_what_is_missing_is_made(
    whole: Path, tmp_path: Path, teacher: Path, text: Path
) -> None:
    lines, folder = texts(text, tmp_path), tmp_path / "t"
    folder.mkdir()
    for name, data in files(whole).items():
        (folder / name).write_bytes(data)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run(folder, lines, teacher)
    assert (done.made, done.kept, done.missing) == (1, len(shards) - 1, 0)
    assert files(folder) == files(whole)
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="does not have the hash"):
        run(folder, lines, teacher)


def test_batches_do_not_change_the_draws(
    tmp_path: Path, teacher: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shortened(text, tmp_path)
    run(tmp_path / "a", text, teacher)
    monkeypatch.setattr("gguforge.distill.sampling.WORKED_ON", 1)  # row by row
    run(tmp_path / "b", text, teacher)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "names"),
    [({"seed": 1}, "other seed"), ({"size": 49}, "other size"), ({"context": 63}, "other context"),
     ({"draws": "independent"}, "other draws"), ({"temperature": 2.0}, "other temperature"),
     ({"shard_bytes": 999}, "other shard_bytes")],
)  # fmt: skip
def test_other_settings_are_refused(
    whole: Path, tmp_path: Path, teacher: Path, text: Path, change: dict[str, Any], names: str
) -> None:
    before = files(whole)
    with pytest.raises(GGUForgeError, match=names):
        run(whole, texts(text, tmp_path), teacher, settings=replace(SMALL, **change))
    assert files(whole) == before


def test_another_teacher_or_text_is_refused(
    whole: Path, tmp_path: Path, teacher: Path, other_teacher: Path, text: Path
) -> None:
    with pytest.raises(GGUForgeError, match="other teachers"):
        run(whole, texts(text, tmp_path), other_teacher)
    with pytest.raises(GGUForgeError, match=r"other .*text"):
        run(whole, text, teacher)


def test_answers_count_and_scores_are_asked_for_there_only(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a user"}]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(talk + talk) + "\n" + json.dumps(talk[:1]) + "\n")
    asked: list[np.ndarray] = []
    original = Forward.read_where
    monkeypatch.setattr(Forward, "read_where", lambda *words: asked.append(words[2]) or original(*words))
    done = run(tmp_path / "t", path, teacher)
    (document,) = open_targets(tmp_path / "t")
    assert done.manifest.template_sha256
    assert len(document.positions) == 8
    ((wanted),) = asked
    np.testing.assert_array_equal(np.flatnonzero(wanted), document.positions)
    assert len(wanted) == document.positions[-1] + 1  # read no further
    assert not document.loss_mask[document.positions[0]]


def test_shards_without_anything_that_counts(tmp_path: Path, teacher: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps([{"role": "user", "content": "hello"}]) + "\n") * 3)
    done = run(tmp_path / "t", path, teacher, settings=replace(SMALL, shard_bytes=1))
    assert (done.made, done.tokens) == (3, 0)
    assert list(open_targets(tmp_path / "t")) == []


def test_a_mixture_of_teachers(tmp_path: Path, teacher: Path, other_teacher: Path, text: Path) -> None:
    sources = [TeacherSource(str(teacher), 3.0, 1), TeacherSource(str(other_teacher), 1.0, 1)]
    collect(sources, [text], tmp_path / "both", replace(SMALL, size=40))
    run(tmp_path / "one", text, teacher, settings=replace(SMALL, size=30))
    both, one = open_targets(tmp_path / "both"), open_targets(tmp_path / "one")
    assert [record.weight for record in both.manifest.teachers] == [0.75, 0.25]
    for mixed, alone in zip(both, one, strict=True):
        np.testing.assert_allclose(np.add.reduceat(mixed.weights, mixed.row_ptr[:-1]), 1, rtol=1e-5)
        counts = {(r, i): w * 40 for r, i, w in zip(_rows(mixed), mixed.ids, mixed.weights, strict=True)}
        for row, token, weight in zip(_rows(alone), alone.ids, alone.weights, strict=True):
            assert counts[row, token] >= weight * 30 - 1e-3
        assert not mixed.lse.any()


def _rows(document: Any) -> list[int]:
    return np.repeat(np.arange(len(document.positions)), np.diff(document.row_ptr)).tolist()


def test_what_does_not_fit_together_is_refused(tmp_path: Path, teacher: Path, other_teacher: Path, text: Path) -> None:
    with pytest.raises(InputError, match="cannot be mixed in top-k"):
        run(tmp_path / "t", text, teacher, other_teacher, settings=replace(SMALL, kind="top-k"))
    with pytest.raises(InputError, match="too many draws"):
        run(tmp_path / "t", text, teacher, settings=replace(SMALL, size=1 << 24))
    with pytest.raises(GGUForgeError, match=r"trained for shorter contexts .*expected at most 512"):
        run(tmp_path / "t", text, teacher, settings=replace(SMALL, context=513))
    assert not (tmp_path / "t").exists()
    with pytest.raises(InputError, match="too small for a single draw"):
        shares([1, 1000], 50)
    assert shares([1, 1, 1], 50) == [17, 17, 16]


def test_ctrl_c_keeps_finished_shards(whole: Path, tmp_path: Path, teacher: Path, text: Path) -> None:
    lines, folder = texts(text, tmp_path), tmp_path / "t"
    states: list[Progress] = []

    def stop(state: Progress) -> None:
        states.append(state)
        if list(folder.glob("*.safetensors")):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(folder, lines, teacher, progress=stop)
    made = files(folder)
    assert made.items() < files(whole).items()
    assert len(made) == 2
    assert all(0 < state.done <= state.total for state in states)
    done = run(folder, lines, teacher)
    assert (done.kept, done.last.done) == (1, done.last.total)
    assert files(folder) == files(whole)
