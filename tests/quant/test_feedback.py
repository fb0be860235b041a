"""Error feedback: outputs change less than after rounding each weight by itself, and the algebra is what it claims."""

from __future__ import annotations

import numpy as np
import pytest

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.fields import LEGACY, RANGES, Fields, pack, range_of, unpack
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.descent import descend
from gguforge.quant.feedback import SHARE, corrected, damped, encode_with_feedback, feedback_of

COLUMNS, ROWS = 512, 40


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    """Of inputs whose columns go together."""
    draw = np.random.default_rng(5)
    mixing = draw.standard_normal((64, COLUMNS)) + 0.3 * draw.standard_normal((64, COLUMNS)) ** 3
    x = draw.standard_normal((2000, 64)) @ mixing + 2 * draw.standard_normal((2000, COLUMNS))
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return (0.03 * np.random.default_rng(6).standard_normal((ROWS, COLUMNS))).astype(np.float32)


def output_error(weights: np.ndarray, data: np.ndarray, type: T, moments: np.ndarray) -> float:
    gap = weights - block_type(type).decode(data)
    return float(np.sum(gap @ moments * gap))


@pytest.mark.parametrize("type", [*RANGES, *LEGACY], ids=lambda type: type.name)
def test_outputs_change_less(type: T, weights: np.ndarray, moments: np.ndarray) -> None:
    plain = block_type(type).encode(weights, np.ascontiguousarray(moments.diagonal()))
    better = encode_with_feedback(weights, damped(moments), type)
    assert better.shape == plain.shape
    assert block_type(type).is_finite(better)
    errors = [output_error(weights, data, type, moments) for data in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("type", [*RANGES, *LEGACY], ids=lambda type: type.name)
def test_descent_never_rises(type: T, weights: np.ndarray, moments: np.ndarray) -> None:
    kind, columns, matrix = block_type(type), np.ascontiguousarray(weights.T), damped(moments)
    blocks = kind.encode(weights).reshape(ROWS, -1).view(kind.layout)
    count = COLUMNS // range_of(type).width
    fields = [unpack(np.ascontiguousarray(blocks[:, number]), type) for number in range(count)]

    def error(fields: list[Fields]) -> float:
        gap = columns - np.concatenate([field.values() for field in fields])
        return float(np.sum(gap * (matrix @ gap)))

    before = error(fields)
    descend(columns, matrix, fields)
    assert error(fields) < 0.8 * before
    for field in fields:  # what was found can be stored
        np.testing.assert_array_equal(unpack(pack(field), type).values(), field.values())


def test_other_types_are_encoded_with_the_diagonal(weights: np.ndarray, moments: np.ndarray) -> None:
    data = encode_with_feedback(weights, moments, T.IQ4_NL)
    assert data.tobytes() == block_type(T.IQ4_NL).encode(weights, np.ascontiguousarray(moments.diagonal())).tobytes()


def test_feedback_factors_the_moments(moments: np.ndarray) -> None:
    matrix = damped(moments)
    upper, diagonal = feedback_of(matrix)
    assert np.allclose(upper.diagonal(), 1)
    assert np.allclose(np.tril(upper, -1), 0)
    np.testing.assert_allclose(upper * diagonal @ upper.T, matrix, rtol=1e-3, atol=1e-3 * matrix.max())


def test_a_wanted_change_is_found(weights: np.ndarray, moments: np.ndarray) -> None:
    matrix = damped(moments)
    wanted = weights[::-1]
    found = corrected(weights, matrix, (wanted - weights) @ matrix)
    np.testing.assert_allclose(found, weights + SHARE * (wanted - weights), atol=1e-4)


def test_columns_that_are_never_excited_do_no_harm(weights: np.ndarray, moments: np.ndarray) -> None:
    quiet = moments.copy()
    quiet[100:200] = 0
    quiet[:, 100:200] = 0
    data = encode_with_feedback(weights, damped(quiet), T.Q4_K)
    assert np.abs(block_type(T.Q4_K).decode(data) - weights).max() < np.abs(weights).max()


def test_no_moments_at_all() -> None:
    x = np.ones((3, 256), np.float32)
    data = encode_with_feedback(x, damped(np.zeros((256, 256), np.float32)), T.Q2_K)
    np.testing.assert_allclose(block_type(T.Q2_K).decode(data), x, atol=1e-3)
