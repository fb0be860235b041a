"""The store of soft targets: what is written comes back, whatever is damaged or mixed up is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from target_sets import manifest, random_document, write_targets

from gguforge.distill.arrays import read_arrays, write_arrays
from gguforge.distill.shards import Layout, Shard, predicting, write_shard
from gguforge.distill.targets import KEY, MANIFEST, open_targets, read_manifest, write_manifest
from gguforge.quant.errors import InputError, OutputError

LAYOUTS = [
    ("sampled", 50, 300), ("sampled", 50, 200_000), ("sampled", 300, 60_000), ("sampled", 300, 100),
    ("sampled", 900, 60_000), ("top-k", 8, 300), ("top-k", 300, 70_000), ("full", 0, 40),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "size", "vocabulary"), LAYOUTS)
def test_what_is_written_comes_back(tmp_path: Path, kind: str, size: int, vocabulary: int) -> None:
    made = manifest(kind, size, vocabulary, shards=2)  # type: ignore[arg-type]
    written = [document for shard in write_targets(tmp_path, made) for document in shard]
    targets = open_targets(tmp_path)
    assert targets.manifest == made
    assert len(targets) == len(written) == 6
    assert targets.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    for document, scored in zip(targets, written, strict=True):
        rows = scored.rows
        np.testing.assert_array_equal(document.input_ids, scored.input_ids)
        np.testing.assert_array_equal(document.loss_mask, scored.loss_mask)
        np.testing.assert_array_equal(document.positions + 1, np.flatnonzero(scored.loss_mask))
        np.testing.assert_array_equal(document.next_log_prob, rows.next_log_prob.astype(np.float32))
        np.testing.assert_array_equal(document.lse, rows.lse.astype(np.float32))
        lengths = np.full(len(rows.lengths), vocabulary) if kind == "full" else rows.lengths
        np.testing.assert_array_equal(np.diff(document.row_ptr), lengths)
        if kind == "sampled":
            np.testing.assert_array_equal(document.ids, rows.ids)
            np.testing.assert_array_equal(document.weights, (rows.counts / size).astype(np.float32))
            np.testing.assert_allclose(np.add.reduceat(document.weights, document.row_ptr[:-1]), 1, rtol=1e-5)
            assert not document.tail.any()
        else:
            np.testing.assert_array_equal(document.weights, np.exp(rows.log_probs.astype(np.float32)).reshape(-1))
        if kind == "top-k":
            np.testing.assert_array_equal(document.ids, rows.ids)
            np.testing.assert_array_equal(document.tail, np.exp(rows.tail.astype(np.float32)))


def test_documents_by_number(tmp_path: Path) -> None:
    written = write_targets(tmp_path, manifest(shards=3))
    targets = open_targets(tmp_path)
    assert [len(document.input_ids) for document in targets[2:5]] == [22, 20, 21]
    np.testing.assert_array_equal(targets[-1].input_ids, written[2][2].input_ids)
    np.testing.assert_array_equal(targets[3].input_ids, written[1][0].input_ids)
    with pytest.raises(IndexError):
        targets[9]
    wanted = -np.concatenate([document.rows.next_log_prob for shard in written for document in shard]).mean(dtype=float)
    assert targets.teacher_loss() == pytest.approx(wanted)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_row_predicts_the_token_after_it(mask: list[bool]) -> None:
    rows = predicting(np.array([False, *mask]))
    assert [i + 1 for i in rows] == [i + 1 for i, counts in enumerate(mask) if counts]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["sampled", "top-k", "full"]), st.integers(1, 700), st.integers(2, 90_000), st.integers(0, 2**32)
)
def test_any_layout(tmp_path_factory: pytest.TempPathFactory, kind: str, size: int, vocabulary: int, seed: int) -> None:
    vocabulary = min(vocabulary, 50) if kind == "full" else vocabulary
    layout = Layout(kind, 0 if kind == "full" else size, vocabulary)  # type: ignore[arg-type]
    document = random_document(np.random.default_rng(seed), layout, 5)
    path = tmp_path_factory.mktemp("shards") / "s.safetensors"
    write_shard(path, [document], layout, {})
    read = Shard(path, layout).document(0)
    if kind != "full":
        np.testing.assert_array_equal(read.ids, document.rows.ids)
    if kind == "sampled":
        np.testing.assert_array_equal(np.rint(read.weights * size), document.rows.counts)


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_targets(tmp_path / name, manifest())
    first, second = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("a", "b"))
    assert first == second


def test_what_is_damaged_or_mixed_up_is_refused(tmp_path: Path) -> None:
    made = manifest(shards=2)
    write_targets(tmp_path, made)
    path = tmp_path / made.shard_name(1)
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_targets(tmp_path)

    path.write_bytes(whole[:-1])
    refused("file is cut short")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("does not have the hash")
    path.unlink()
    refused("1 of 2 shards are missing")
    other = replace(made, seed=1)
    write_shard(path, [random_document(np.random.default_rng(0), made.layout, 9)], made.layout, {KEY: other.key})
    refused("belongs to other targets")
    path.unlink()
    wrong = Layout("top-k", 4, made.vocabulary)
    write_shard(path, [random_document(np.random.default_rng(0), wrong, 9)], wrong, {KEY: made.key})
    refused("other arrays or types")
    with pytest.raises(OutputError, match="other seed"):
        write_manifest(tmp_path, other)
    with pytest.raises(InputError, match="holds no soft targets"):
        open_targets(tmp_path / "none")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    layout = Layout("sampled", 50, 300)
    document = random_document(np.random.default_rng(0), layout, 9)
    document.rows.ids[-1] = 301
    write_shard(tmp_path / "s", [document], layout, {})
    with pytest.raises(InputError, match="do not fit together"):
        Shard(tmp_path / "s", layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "2"}, "no manifest that this version"), ({"kind": "best"}, "is unknown"), ({"seed": "0"}, "is no int"),
     ({"seed": True}, "is no int"), ({"more": 1}, "other fields"), ({"teachers": [{}]}, "other fields")],
)  # fmt: skip
def test_manifests_with_faults_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_manifest(tmp_path, manifest())
    data = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)


def test_names_are_no_part_of_the_key() -> None:
    made = manifest()
    teacher, text = made.teachers[0], made.text[0]
    renamed = replace(made, teachers=(replace(teacher, name="x", engine="y"),), text=(replace(text, name="z"),))
    assert renamed.key == made.key
    assert replace(made, teachers=(replace(teacher, sha256="x"),)).key != made.key
    assert made.differences(replace(made, text=(replace(text, bytes=1),))) == ["text"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS[:1] + LAYOUTS[5:]), st.data())
def test_hostile_numbers_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, layout: tuple[str, int, int], data: st.DataObject
) -> None:
    """Any numbers in any array under a right hash: an error in one line, or documents within the vocabulary."""
    shape = Layout(*layout)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("hostile")
    write_shard(folder / "s", [random_document(np.random.default_rng(0), shape, 9)] * 2, shape, {})
    arrays = {name: array.copy() for name, array in read_arrays(folder / "s").items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    raw = arrays[name].reshape(-1).view(np.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        if raw.size:
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()) and len(arrays[name]):
        arrays[name] = arrays[name][:-1]
    write_arrays(folder / "t", arrays, {})
    try:
        shard = Shard(folder / "t", shape)
    except InputError:
        return
    for number in range(shard.documents):
        document = shard.document(number)
        assert len(document.row_ptr) == len(document.positions) + 1
        assert document.row_ptr[-1] == len(document.ids) == len(document.weights)
        for ids in (document.ids, document.input_ids):
            assert ((ids >= 0) & (ids < shape.vocabulary)).all()
