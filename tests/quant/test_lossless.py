"""Weights on a quantization grid are recognised, and put on it without loss; ordinary weights are not, in no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.quant.blocks import block_type, decode, encode
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError
from gguforge.quant.lossless import TYPES, LosslessSource, hint, is_lossless, lossless_plan
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.reader import read_gguf
from gguforge.quant.search.recover import recover
from gguforge.quant.search.refine import refined
from gguforge.quant.sources import ArraySource, FileSource, Source
from gguforge.quant.writer import write

STORED = (T.F32, T.F16, T.BF16)


def weights(*shape: int, seed: int = 1) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def rounded(values: np.ndarray, stored: T) -> np.ndarray:
    return decode(encode(values, stored), stored)


def on_grid(type: T, stored: T, rows: int = 24, columns: int = 512, seed: int = 1) -> np.ndarray:
    """What a file of that type gives when it is turned into floats."""
    return rounded(decode(encode(weights(rows, columns, seed=seed), type), type), stored)


def stored_in(path: Path, values: np.ndarray, stored: T) -> Source:
    encode(values, stored).tofile(path)
    return FileSource(str(path), 0, values.shape, stored)


def one_tensor(source: Source, type: T) -> Plan:
    return Plan({}, (TensorPlan("blk.0.ffn_up.weight", source.shape, type, source),))


@pytest.mark.parametrize("stored", STORED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("type", TYPES, ids=lambda kind: kind.name)
def test_every_grid_is_found_again(type: T, stored: T) -> None:
    x = on_grid(type, stored).reshape(-1, block_type(type).size)
    data, found = recover(x, type, stored)
    assert found.all()
    np.testing.assert_array_equal(rounded(decode(data, type), stored), x)
    again = 0.02 * x + weights(*x.shape)  # neither these nor those
    assert not recover(rounded(again, stored), type, stored)[1].any()


@pytest.mark.parametrize("type", [kind for kind in TYPES if issubclass(block_type(kind), GroupedBlock)])
def test_levels_that_training_moved_while_scales_were_held(type: T) -> None:
    kind, rng = block_type(type), np.random.default_rng(2)
    assert issubclass(kind, GroupedBlock)
    blocks = encode(weights(32, 512), type).reshape(-1).view(kind.layout)
    moved = kind.levels(blocks) + rng.integers(-2, 3, (len(blocks), kind.size), dtype=np.int8)
    kind.put_levels(moved.clip(kind.low, kind.high), blocks)
    x = rounded(kind.decode(blocks.view(np.uint8).reshape(len(blocks), -1)), T.BF16)
    assert recover(x, type, T.BF16)[1].all()


def test_high_levels_that_rounding_leaves_in_doubt() -> None:
    block = np.zeros(1, block_type(T.Q8_0).layout)
    block["d"] = 0.001238
    block["qs"] = [
        15, 12, -12, 127, -79, -48, 64, 4, -2, -4, 28, -64, 32, -48, -79, 54, -103, 12, -48, -7, -55, -28, -28, 23,
        -114, -17, 0, -75, -1, 0, -3, -29,
    ]  # fmt: skip
    x = rounded(decode(block.view(np.uint8).reshape(1, -1), T.Q8_0), T.BF16)
    data, found = recover(x, T.Q8_0, T.BF16)
    assert found.all()
    np.testing.assert_array_equal(data.view(block.dtype)["qs"][0], block["qs"])


@settings(max_examples=20, deadline=None)
@given(
    type=st.sampled_from([T.Q4_0, T.Q8_0, T.Q4_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q6_K]),
    scale=st.floats(1e-3, 10),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_found_gives_the_weights_back(type: T, scale: float, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = weights(16, 256, seed=seed) * np.float32(scale)
    x[rng.random(x.shape) < zeros] = 0
    x = decode(refined(x, type), type).reshape(-1, block_type(type).size)
    data, found = recover(x, type, T.F32)
    np.testing.assert_array_equal(decode(data[found], type), x[found])
    assert found.all() or zeros > 0.3  # groups of one repeated weight tell their scale and minimum no more


@pytest.mark.parametrize("stored", STORED, ids=lambda kind: kind.name)
def test_a_tensor_gets_the_smallest_type_that_holds_it(stored: T, tmp_path: Path) -> None:
    source = stored_in(tmp_path / "w", on_grid(T.Q4_0, stored), stored)
    chosen = {}
    for wanted in (T.Q8_0, T.Q6_K, T.Q4_K, T.Q4_0, T.Q2_K):
        plan = one_tensor(source, wanted)
        (tensor,) = lossless_plan(plan).tensors
        chosen[wanted] = tensor.type
        assert is_lossless(tensor) == (wanted != T.Q2_K) == ("lossless" in tensor.reason)
        assert tensor.source.stored is source
    assert chosen == {T.Q8_0: T.Q4_0, T.Q6_K: T.Q4_0, T.Q4_K: T.Q4_0, T.Q4_0: T.Q4_0, T.Q2_K: T.Q2_K}


@pytest.mark.parametrize("type", [T.TQ1_0, T.TQ2_0, T["Q2_0"]], ids=lambda kind: kind.name)
def test_ternary_weights_with_one_scale(type: T, tmp_path: Path) -> None:
    x = np.random.default_rng(3).integers(-1, 2, (16, 512)).astype(np.float32) * np.float32(0.0419921875)
    plan = lossless_plan(one_tensor(stored_in(tmp_path / "w", x, T.BF16), type))
    assert plan.tensors[0].type == T.TQ1_0
    write(plan, tmp_path / "out.gguf", workers=1)
    (written,) = read_gguf(tmp_path / "out.gguf").tensors
    np.testing.assert_array_equal(FileSource(str(written.path), written.offset, x.shape, written.type).rows(0, 16), x)


def test_ordinary_weights_are_left_alone(tmp_path: Path) -> None:
    for stored in STORED:
        x = rounded(weights(16, 512), stored)
        plan = one_tensor(stored_in(tmp_path / stored.name, x, stored), T.Q8_0)
        assert lossless_plan(plan).tensors == plan.tensors
        assert hint(plan) is None
    x[:, :480] = 0  # and though most of them be zeros
    plan = one_tensor(ArraySource(x), T.Q4_0)
    assert lossless_plan(plan).tensors == plan.tensors


def test_one_weight_beside_the_grid_is_enough(tmp_path: Path) -> None:
    x = on_grid(T.Q4_K, T.F16, rows=1100)
    x[3, 77] *= np.float32(1.25)
    plan = one_tensor(stored_in(tmp_path / "w", x, T.F16), T.Q4_K)
    assert lossless_plan(plan).tensors == plan.tensors


def test_a_hint_only_where_llama_cpps_encoder_loses_something(tmp_path: Path) -> None:
    same = one_tensor(stored_in(tmp_path / "a", on_grid(T.Q4_0, T.F16), T.F16), T.Q4_0)
    assert hint(same) is None
    other = one_tensor(stored_in(tmp_path / "b", on_grid(T.Q3_K, T.F16), T.F16), T.Q3_K)
    assert hint(other) == ("blk.0.ffn_up.weight", T.Q3_K)


def test_weights_that_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    x = on_grid(T.Q4_0, T.F16)
    source = stored_in(tmp_path / "w", x, T.F16)
    x[2, 3] *= np.float32(1.25)
    stored_in(tmp_path / "w", x, T.F16)
    assert LosslessSource(source, T.Q4_0).raw_rows(0, 2).shape == (2, 288)
    with pytest.raises(DataError, match="not on its grid any more"):
        LosslessSource(source, T.Q4_0).raw_rows(2, 4)
