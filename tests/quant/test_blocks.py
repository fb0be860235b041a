"""Block types: bit for bit those of ggml, on every kind of row that a checkpoint can hold."""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path

import ggml
import numpy as np
import pytest
from block_rows import KINDS, ROW, WEIGHTS, columns, digests, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gguforge.quant.blocks import REGISTRY, block_type, decode, encode
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError

TYPES = sorted(REGISTRY)
ENCODED = [kind for kind in TYPES if kind != T.F32]
UNWEIGHTED = [kind for kind in ENCODED if not REGISTRY[kind].required]
SLOW = {T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S}
SLOW_START = {T.IQ1_S, T.IQ1_M, T.IQ2_S}  # ggml makes its lists of neighbours for many seconds before the first block
SEARCHED = [kind for kind in ENCODED if REGISTRY[kind].importance != "ignored"]


def against_ggml(kinds: list[T]) -> list[object]:
    """Parameters of a test against ggml itself; for types that start slowly there are `digests`."""
    return [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW_START else (), id=kind.name) for kind in kinds]


GOLDEN = json.loads((Path(__file__).parent / "golden_blocks.json").read_text())
exact = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="elsewhere compilers fuse multiply and add in ggml: it differs",
)


def assert_same(x: np.ndarray, type: T, ours: np.ndarray, theirs: np.ndarray) -> None:
    """All blocks have the same bytes."""
    nbytes = GGML_QUANT_SIZES[type][1]
    differ = (ours.reshape(-1, nbytes) != theirs.reshape(-1, nbytes)).any(axis=1)
    if type == T.IQ3_S:  # ggml writes what follows a group of zeros into the wrong place: see the test below
        differ &= (x.reshape(-1, 8, 32) != 0).any(axis=2).all(axis=1)
    worst = np.flatnonzero(differ)
    assert not len(worst), f"{len(worst)} of {len(differ)} blocks differ, first {worst[0]}"


@exact
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", against_ggml(UNWEIGHTED))
def test_encode_equals_ggml(type: T, kind: str) -> None:
    x = rows(kind, 12 if type in SLOW else 48)
    ours = encode(x, type)
    assert_same(x, type, ours, ggml.encode(x, type, ours.size))


@exact
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", against_ggml(SEARCHED))
def test_encode_with_importance_equals_ggml(type: T, kind: str) -> None:
    x = rows(kind, 3 if type in SLOW else 6)
    for importance in WEIGHTS:
        weights = columns(importance)
        ours = encode(x, type, weights)
        assert_same(x, type, ours, ggml.encode(x, type, ours.size, weights))


@pytest.mark.parametrize("name", GOLDEN["digests"])
def test_encode_equals_what_ggml_wrote(name: str) -> None:
    type = T[name]
    found = digests(lambda x, weights: encode(x, type, weights), REGISTRY[type].required)
    assert found == GOLDEN["digests"][name]


@pytest.mark.parametrize("type", sorted(set(UNWEIGHTED) - set(SEARCHED)), ids=lambda kind: kind.name)
def test_importance_is_ignored_where_ggml_ignores_it(type: T) -> None:
    x = rows("gaussian", 4)
    assert (encode(x, type, columns("random")) == encode(x, type)).all()


@pytest.mark.parametrize("type", ENCODED, ids=lambda kind: kind.name)
def test_decode_equals_ggml_on_any_bytes(type: T) -> None:
    size, nbytes = GGML_QUANT_SIZES[type]
    n = max(1, 4096 // size)
    data = np.random.default_rng(1).integers(0, 256, (n, nbytes), dtype=np.uint8)
    ours, theirs = decode(data, type).ravel(), ggml.decode(data, type, n * size)
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()


@pytest.mark.parametrize("type", TYPES, ids=lambda kind: kind.name)
def test_layout_is_the_c_struct(type: T) -> None:
    kind = block_type(type)
    assert (kind.size, kind.layout.itemsize) == GGML_QUANT_SIZES[type]


PLAIN = [T.F32, T.F16, T.BF16]


@pytest.mark.parametrize("stored", PLAIN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("type", [T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q4_K, T.MXFP4], ids=lambda kind: kind.name)
def test_rows_are_encoded_alike_however_they_are_stored(type: T, stored: T) -> None:
    for kind in KINDS:
        data = encode(rows(kind), stored)
        if block_type(stored).is_finite(data):
            found = block_type(type).encode_stored(data, block_type(stored))
            assert (found == encode(decode(data, stored), type)).all(), kind


@pytest.mark.parametrize("stored", PLAIN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("type", [kind for kind in TYPES if REGISTRY[kind].shows_nan], ids=lambda kind: kind.name)
def test_blocks_show_what_is_no_number(type: T, stored: T) -> None:
    sign = {T.F32: 1 << 31}.get(stored, 1 << 15)
    infinity = int(encode(np.array([[np.inf]], np.float32), stored).view(f"<u{2 if sign < 1 << 31 else 4}")[0, 0])
    for word in (infinity, infinity + 1, infinity | infinity >> 1, sign - 1):
        for bits, x in itertools.product((word, word | sign), (rows("gaussian", 1), rows("zero", 1))):
            data = encode(x, stored)
            data.view(f"<u{2 if sign < 1 << 31 else 4}")[0, 77] = bits
            assert not block_type(stored).is_finite(data)
            assert not block_type(type).is_finite(block_type(type).encode_stored(data, block_type(stored))), hex(bits)


def golden_row(field: str, type: T) -> np.ndarray:
    """The first block of a golden input."""
    bits = np.array([int(word, 16) for word in GOLDEN[field]], np.uint32)
    return bits.view(np.float32)[: max(32, GGML_QUANT_SIZES[type][0])]


@pytest.mark.parametrize("name", GOLDEN["blocks"])
def test_golden_block(name: str) -> None:
    data = encode(golden_row("input", T[name])[None], T[name])
    assert data.tobytes().hex() == GOLDEN["blocks"][name]


@pytest.mark.parametrize("name", GOLDEN["weighted"])
def test_golden_block_with_importance(name: str) -> None:
    data = encode(golden_row("input", T[name])[None], T[name], golden_row("importance", T[name]))
    assert data.tobytes().hex() == GOLDEN["weighted"][name]


@pytest.mark.parametrize("type", TYPES, ids=lambda kind: kind.name)
def test_rows_are_independent_of_their_neighbours(type: T) -> None:
    size = GGML_QUANT_SIZES[type][0]
    n = 2 * max(REGISTRY[type].tile, REGISTRY[type].weighted_tile) * size // ROW + 3
    x, weights = rows("mixed scales", n), columns("random") if REGISTRY[type].required else None
    chosen = [0, n // 2, n - 1]
    alone = np.concatenate([encode(x[i : i + 1], type, weights) for i in chosen])
    assert (encode(x, type, weights)[chosen] == alone).all()


@exact
@pytest.mark.parametrize("type", against_ggml(SEARCHED))
def test_a_single_block_is_summed_in_order_too(type: T) -> None:
    size = GGML_QUANT_SIZES[type][0]
    for i in range(0, ROW, size):
        x, weights = rows("gaussian", 1)[:, i : i + size], columns("random")[i : i + size]
        ours = encode(x, type, weights)
        assert_same(x, type, ours, ggml.encode(x, type, ours.size, weights))


ERROR = {T.Q8_0: 0.006, T.Q6_K: 0.02, T.Q5_K: 0.04, T.Q4_K: 0.08, T.Q3_K: 0.17, T.Q2_K: 0.32,
         T.Q5_1: 0.04, T.Q5_0: 0.05, T.Q4_1: 0.08, T.Q4_0: 0.1, T.F16: 3e-4, T.BF16: 2e-3, T.F32: 0,
         T.IQ4_NL: 0.08, T.IQ4_XS: 0.08, T.MXFP4: 0.12, T.NVFP4: 0.11, T.Q1_0: 0.61, T["Q2_0"]: 0.72, T.TQ1_0: 0.81,
         T.TQ2_0: 0.81, T.IQ2_XXS: 0.6, T.IQ2_XS: 0.6, T.IQ2_S: 0.6, T.IQ3_XXS: 0.3,
         T.IQ3_S: 0.3, T.IQ1_S: 0.9, T.IQ1_M: 0.9}  # fmt: skip


@pytest.mark.parametrize("type", TYPES, ids=lambda kind: kind.name)
def test_round_trip_error_is_that_of_the_type(type: T) -> None:
    x, weights = rows("gaussian"), np.ones(ROW, np.float32) if REGISTRY[type].required else None
    difference = decode(encode(x, type, weights), type) - x
    assert np.sqrt(np.mean(difference**2) / np.mean(x**2)) <= ERROR[type]


importances = st.floats(width=32, min_value=0, max_value=2.0**20)
# Beyond 2^60 the squares of a block add up to infinity in C, and so does the importance of its weights.
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@exact
@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (1, 256), elements=finite), st.sampled_from(sorted(set(UNWEIGHTED) - SLOW_START)))
def test_encode_equals_ggml_on_whatever_hypothesis_finds(x: np.ndarray, type: T) -> None:
    ours = encode(x, type)
    if block_type(type).is_finite(ours):
        assert_same(x, type, ours, ggml.encode(x, type, ours.size))


@exact
@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.sampled_from([(1, 256), (3, 256)]), elements=finite),
    arrays(np.float32, 256, elements=importances),
    st.sampled_from(sorted(set(SEARCHED) - SLOW_START)),
)
def test_encode_with_importance_equals_ggml_on_whatever_hypothesis_finds(x: np.ndarray, w: np.ndarray, type: T) -> None:
    ours = encode(x, type, w)
    if block_type(type).is_finite(ours):
        assert_same(x, type, ours, ggml.encode(x, type, ours.size, w))


@exact
def test_infinite_sums_of_one_group_leave_no_block_that_looks_sound() -> None:
    """Found by Hypothesis: importance times weight beyond float32, where its level is 0."""
    x, weights = np.full((1, 256), 4.4578144e16, np.float32), np.ones(256, np.float32)
    x[0, 160], weights[161] = 7.1641209e17, 76503
    ours = encode(x, T.Q3_K, weights)
    assert not block_type(T.Q3_K).is_finite(ours)
    assert not block_type(T.Q3_K).is_finite(ggml.encode(x, T.Q3_K, ours.size, weights))


@exact
@pytest.mark.parametrize("type", [T.IQ4_NL, T.IQ4_XS], ids=lambda kind: kind.name)
def test_importance_of_weights_whose_squares_almost_overflow(type: T) -> None:
    x, weights = rows("gaussian", 4)[:, :256] * np.float32(4.6e19), columns("random")[:256]
    total = np.square(x, dtype=np.float64).sum(axis=1) / np.finfo(np.float32).max
    assert ((total > 0.5) & (total < 1)).all()
    ours = encode(x, type, weights)
    assert (ours == ggml.encode(x, type, ours.size, weights)).all()


def test_iq3_s_survives_a_group_of_zeros() -> None:
    x = rows("gaussian", 1)[:, :256]
    x[:, 32:64] = 0
    ours = encode(x, T.IQ3_S)
    theirs = ggml.encode(x, T.IQ3_S, ours.size)
    error = [float(np.abs(decode(data, T.IQ3_S) - x).max()) for data in (ours, theirs)]
    assert error[0] < 0.3 * np.abs(x).max()
    assert error[1] > np.abs(x).max()  # once ggml is repaired, the exception in assert_same can go


def test_a_type_that_needs_importance_says_so() -> None:
    with pytest.raises(InputError, match="IQ2_XXS needs an importance matrix"):
        encode(np.zeros((1, 256), np.float32), T.IQ2_XXS)


def test_overflow_is_seen() -> None:
    for type in (T.F16, T.Q4_0, T.Q8_0, T.Q4_K, T.Q6_K):
        data = encode(np.full((1, 256), 1e30, np.float32), type)
        assert not block_type(type).is_finite(data), type.name


def test_mxfp4_exponent_of_no_number_is_seen() -> None:
    data = encode(np.full((1, 32), 1.5e-38, np.float32), T.MXFP4)  # C wraps the exponent around to 255
    assert not block_type(T.MXFP4).is_finite(data)
    assert block_type(T.MXFP4).is_finite(encode(rows("gaussian", 1), T.MXFP4))


def test_bf16_keeps_nan_a_nan() -> None:
    x = np.array([[0x7F800001, 0xFFC00000, 0x7F7FFFFF, 0x00018000]], np.uint32).view(np.float32)
    assert encode(x, T.BF16).view(np.uint16).tolist() == [[0x7FC0, 0xFFC0, 0x7F80, 0x0002]]


def test_every_half_is_decoded_as_numpy_does() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for chosen in (halves, halves[np.isfinite(halves)]):  # with infinity and NaN, and without
        expected = chosen.astype(np.float32)
        assert np.array_equal(decode(chosen.view(np.uint8), T.F16).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type", [T.F16, T.BF16])
def test_any_float_is_cast_as_ggml_does(type: T) -> None:
    bits = np.random.default_rng(5).integers(0, 1 << 32, (2, 1 << 17), dtype=np.uint32)
    bits[1] = bits[1] & 0x8FFFFFFF | 0x30000000  # around the halves
    x = bits.view(np.float32)
    for row in x:
        row[np.isnan(row)] = 0
        ours = encode(row[None], type)
        assert (ours == ggml.encode(row[None], type, ours.size)).all()


def test_unknown_type_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="Q8_K is not supported"):
        encode(np.zeros((1, 256), np.float32), T.Q8_K)
