"""A checkpoint through torch against the same checkpoint converted, through llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gguforge.convert.conversion import convert
from gguforge.distill.collect import collect
from gguforge.distill.collector import Settings
from gguforge.distill.sampling import Reducer, uniforms
from gguforge.distill.shards import Document, Kind, Rows
from gguforge.distill.targets import Targets, open_targets
from gguforge.distill.teachers.open import TeacherSource
from gguforge.quant.errors import InputError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

DEMO = Path(__file__).parents[2] / "distill" / "demo_model"
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am the model that ships inside gguforge."},
    {"role": "user", "content": "What is a GGUF file?"},
    {"role": "assistant", "content": "It holds a model."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    convert(DEMO, folder / "demo.gguf", type="F32", warn=lambda line: None)
    (folder / "talk.jsonl").write_text(json.dumps(TALK) + "\n")
    return folder


def collected(folder: Path, teacher: Path, name: str, settings: Settings) -> Targets:
    collect([TeacherSource(str(teacher), threads=1, device="cpu")], [folder / "talk.jsonl"], folder / name, settings)
    return open_targets(folder / name)


@pytest.mark.parametrize(("kind", "size"), [("full", 0), ("top-k", 10), ("sampled", 50)])
def test_both_engines_agree(folder: Path, kind: Kind, size: int) -> None:
    settings = Settings(kind=kind, size=size, context=128)
    ours = collected(folder, DEMO, f"torch-{kind}", settings)
    theirs = collected(folder, folder / "demo.gguf", f"llama-{kind}", settings)
    assert ours.manifest.tokenizer_sha256 == theirs.manifest.tokenizer_sha256
    assert ours.manifest.teachers[0].type == "BF16"
    (one,), (two,) = ours, theirs
    np.testing.assert_array_equal(one.input_ids, two.input_ids)
    np.testing.assert_array_equal(one.positions, two.positions)
    np.testing.assert_allclose(one.next_log_prob, two.next_log_prob, rtol=0.05, atol=0.03)
    np.testing.assert_allclose(one.lse, two.lse, rtol=0.01)
    # scores differ a little, so the last of the best and some draws may be neighbours
    apart = [0.5 * np.abs(ours - theirs).sum() for ours, theirs in zip(dense(one), dense(two), strict=True)]
    assert np.mean(apart) < {"full": 0.005, "top-k": 0.02, "sampled": 0.1}[kind]


def dense(document: Document) -> np.ndarray:
    """Weights, shape (rows, vocabulary)."""
    weights = np.zeros((len(document.positions), 2048))
    weights[np.repeat(np.arange(len(weights)), np.diff(document.row_ptr)), document.ids] = document.weights
    return weights


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize(("kind", "size"), [("full", 0), ("top-k", 10), ("sampled", 50)])
def test_scores_on_a_device_are_reduced_as_in_memory(kind: str, size: int, temperature: float) -> None:
    from gguforge.distill.teachers.checkpoint import DeviceReducer

    draw = np.random.default_rng(0)
    scores = (4 * draw.standard_normal((6, 1000))).astype(np.float32)
    ids = np.arange(6, dtype=np.int32)
    reduce = Reducer(kind, size, 1000, temperature)
    at = uniforms(0, ids, 50, "independent")
    ours, known = DeviceReducer(reduce)(torch.from_numpy(scores), ids, at), reduce(scores, ids, at)
    for name in Rows.__dataclass_fields__:
        np.testing.assert_allclose(getattr(ours, name), getattr(known, name), rtol=2e-3, atol=1e-3, err_msg=name)


def test_the_head_in_parts_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(kind="top-k", size=10, context=128)
    whole = collected(folder, DEMO, "whole", settings)
    monkeypatch.setattr("gguforge.distill.teachers.checkpoint._SCORES_AT_A_TIME", 5000)
    parts = collected(folder, DEMO, "parts", settings)
    (one,), (two,) = whole, parts
    np.testing.assert_array_equal(one.positions, two.positions)
    np.testing.assert_allclose(one.next_log_prob, two.next_log_prob, atol=2e-3)


def test_what_cannot_be_opened_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trained for shorter contexts .*expected at most 512"):
        collected(folder, DEMO, "t", Settings(context=513))
    nowhere = TeacherSource(str(DEMO), device="cuda:99")
    with pytest.raises(InputError, match="cannot be opened"):
        collect([nowhere], [folder / "talk.jsonl"], tmp_path / "t", Settings(context=64))
    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["NoModel"]}))
    with pytest.raises(InputError, match="NoModel"):
        collected(folder, copy, "t", Settings(context=64))


def test_other_weights_are_another_teacher(folder: Path, tmp_path: Path) -> None:
    from gguforge.convert.checkpoint import read_checkpoint
    from gguforge.distill.teachers.checkpoint import identity

    copy = tmp_path / "copy"
    shutil.copytree(DEMO, copy)
    known = identity(read_checkpoint(DEMO))
    assert identity(read_checkpoint(copy)) == known
    data = bytearray((copy / "model.safetensors").read_bytes())
    tensor = next(iter(read_checkpoint(DEMO).tensors.values()))
    data[tensor.offset] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert identity(read_checkpoint(copy)) != known
