"""The better search is nowhere worse than llama.cpp's, in the error that it minimizes, and takes the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.fields import RANGES, unpack
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.refine import importance, refine, refined

ROWS, LENGTH = 24, 512


def weights(seed: int, scale: float = 0.05) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (scale * draw.standard_t(4, (ROWS, LENGTH))).astype(np.float32)


@pytest.mark.parametrize("type", list(RANGES), ids=lambda type: type.name)
@pytest.mark.parametrize("known", [False, True])
def test_the_error_falls(type: T, known: bool) -> None:
    x, kind = weights(1), block_type(type)
    columns = np.random.default_rng(2).lognormal(0, 1, LENGTH).astype(np.float32) if known else None
    plain, better = kind.encode(x, columns), refined(x, type, columns)
    assert better.shape == plain.shape
    blocks = np.ascontiguousarray(x.reshape(-1, 256).T)
    w = np.ones((1, LENGTH), np.float32) if columns is None else columns[None]
    w = importance(blocks, np.tile(w, (ROWS, 1)).reshape(-1, 256).T, known)
    before, after = (w * (blocks - kind.decode(data).reshape(-1, 256).T) ** 2 for data in (plain, better))
    assert (after.sum(axis=0) <= before.sum(axis=0) * (1 + 1e-5)).all()
    assert after.sum() < 0.999 * before.sum()


@pytest.mark.parametrize("type", list(RANGES), ids=lambda type: type.name)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-8, 1e4])
def test_constant_rows_are_encoded(type: T, value: float) -> None:
    x, kind = np.full((2, 256), value, np.float32), block_type(type)
    data = refined(x, type)
    assert kind.is_finite(data)
    assert np.abs(kind.decode(data) - x).max() <= np.abs(kind.decode(kind.encode(x)) - x).max()


def test_types_without_scales_of_scales_are_left_alone() -> None:
    x = weights(3)
    assert refined(x, T.Q8_0).tobytes() == block_type(T.Q8_0).encode(x).tobytes()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-5, 100), type=st.sampled_from(list(RANGES)))
def test_numbers_stay_within_the_type(seed: int, scale: float, type: T) -> None:
    x = np.ascontiguousarray(weights(seed, scale)[:4, :256].T)
    kind, range = block_type(type), RANGES[type]
    found = refine(x, np.ones((1, 4), np.float32), unpack(kind.encode(x.T.copy()).reshape(-1).view(kind.layout), type))
    assert found.level.min() >= range.level[0]
    assert found.level.max() <= range.level[1]
    assert found.scale.min() >= range.scale[0]
    assert found.scale.max() <= range.scale[1]
    assert 0 <= found.minimum.min() <= found.minimum.max() <= range.minimum
    assert np.isfinite(found.values()).all()
