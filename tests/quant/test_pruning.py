"""Pruned layers: which tensors go, what the others are called, and the very bytes of llama-quantize."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st
from peer import exact, llama_quantize

from gguforge.quant.errors import InputError
from gguforge.quant.metadata import uint32
from gguforge.quant.plan import Plan
from gguforge.quant.pruning import parse_layers, without_layers
from gguforge.quant.quantize import Guide, plan_of_file, quantize, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    write(models.build(path.parent, T.F16, layers=5), path, workers=1)
    return path


@exact
@pytest.mark.parametrize("preset", ["COPY", "Q4_K_M", "Q3_K_M"])
@pytest.mark.parametrize("prune", [(0,), (4,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_file_equals_llama_quantize(prune: tuple[int, ...], preset: str, model: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert llama_quantize(model, theirs, preset, prune=prune)
    quantize(model, ours, preset, workers=1, prune=prune)
    assert ours.read_bytes() == theirs.read_bytes()
    assert read_gguf(ours).metadata["llama.block_count"] == uint32(5 - len(prune))


@exact
def test_importance_goes_with_the_tensor_and_not_with_its_number(model: Path, tmp_path: Path) -> None:
    weights = {
        tensor.name: np.square(models.weights(seed, (1, tensor.shape[-1])) * np.float32(50))
        for seed, tensor in enumerate(read_gguf(model).tensors)
        if len(tensor.shape) > 1 and "token_embd" not in tensor.name
    }
    guide = Guide(weights, "imatrix.gguf")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert llama_quantize(model, theirs, "Q4_0", prune=[1], guide=guide)
    plan = quantize(model, ours, "Q4_0", workers=1, prune=[1], guide=guide)
    found = read_gguf(theirs)
    assert [(t.name, t.type) for t in found.tensors] == [(t.name, t.type) for t in plan.tensors]
    assert ours.read_bytes()[len(plan.header) :] == theirs.read_bytes()[found.data_offset :]


def test_the_number_of_layers_stands_last_even_where_it_was_overridden(model: Path) -> None:
    copied = plan_of_file(read_gguf(model))
    made = retype(copied, "Q8_0", prune=[2], metadata={"llama.block_count": uint32(7), "a.key": uint32(1)})
    assert list(made.metadata)[-2:] == ["a.key", "llama.block_count"]
    assert made.metadata["llama.block_count"] == uint32(4)


@given(st.sets(st.integers(0, 30), min_size=2), st.data())
def test_what_stays_keeps_its_order_and_is_numbered_without_gaps(layers: set[int], data: st.DataObject) -> None:
    pruned = data.draw(st.sets(st.sampled_from(sorted(layers)), min_size=1, max_size=len(layers) - 1))
    names = ["output.weight", *(f"{side}blk.{i}.attn_q.weight" for i in layers for side in ("", "enc."))]
    renamed, count = without_layers(names, pruned)
    kept = sorted(layers - pruned)
    new = [int(renamed[f"blk.{i}.attn_q.weight"].split(".")[1]) for i in kept]
    before = [i for i in kept if i < min(pruned)]
    assert new[: len(before)] == before  # those keep their numbers, gaps too
    start = before[-1] + 1 if before else 0
    assert new[len(before) :] == list(range(start, start + len(kept) - len(before)))
    assert count == new[-1] + 1
    assert [renamed[f"enc.blk.{i}.attn_q.weight"] for i in kept] == [f"enc.blk.{i}.attn_q.weight" for i in new]
    assert renamed["output.weight"] == "output.weight"
    assert len(renamed) == 1 + 2 * len(kept)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ((5,), r"no layer 5 to prune \(expected 0 to 4\)"),
        ((1, 9), "no layer 9"),
        ((0, 1, 2, 3, 4), "no layer would be left"),
    ],
)
def test_what_cannot_be_pruned(prune: tuple[int, ...], message: str, model: Path) -> None:
    with pytest.raises(InputError, match=message):
        retype(plan_of_file(read_gguf(model)), "COPY", prune=prune)


def test_a_file_without_layers(model: Path) -> None:
    plan = plan_of_file(read_gguf(model))
    bare = Plan(plan.metadata, tuple(tensor for tensor in plan.tensors if "blk" not in tensor.name))
    with pytest.raises(InputError, match=r"no layer 0 to prune \(expected none\)"):
        retype(bare, "COPY", prune=[0])


def test_numbers_of_layers() -> None:
    assert parse_layers(["3,1", " 2 ", "1"]) == (1, 2, 3)
    assert parse_layers([]) == ()
    for text in ("", "1,", "-1", "x", "1-3", "1 2"):
        with pytest.raises(InputError, match="is no layer"):
            parse_layers([text])
