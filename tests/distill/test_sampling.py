"""Draws are right on average and the same in any batch; top-k and full rows against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguforge.distill.sampling import BLOCK, Draws, Masses, Reducer, Softmax, mixture, pick, uniforms
from gguforge.distill.shards import Rows
from gguforge.quant.errors import DataError

HOW: tuple[Draws, ...] = ("independent", "stratified")


def scores_of(vocabulary: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    """Scores with a long tail."""
    draw = np.random.default_rng(seed)
    ranks = np.stack([draw.permutation(vocabulary) + 1 for _ in range(rows)])
    return (draw.standard_normal((rows, vocabulary)) - 1.2 * np.log(ranks)).astype(np.float32)


def reduced(scores: np.ndarray, at: np.ndarray, size: int = 50) -> Rows:
    return Reducer("sampled", size, scores.shape[1])(scores, np.zeros(len(scores), np.int32), at)


def dense(rows: Rows, vocabulary: int) -> np.ndarray:
    """Counts, shape (rows, vocabulary)."""
    counts = np.zeros((len(rows.lengths), vocabulary), np.int64)
    counts[np.repeat(np.arange(len(rows.lengths)), rows.lengths), rows.ids] = rows.counts
    return counts


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_draws_are_right_on_average(how: Draws, vocabulary: int) -> None:
    """Over many documents: averages within their standard errors, which stratified draws make smaller."""
    scores = scores_of(vocabulary)
    probabilities = np.exp(scores[0].astype(np.float64))
    probabilities /= probabilities.sum()
    draws, repeats = 50, 4000
    at = np.concatenate([uniforms(seed, np.array([7], np.int32), draws, how) for seed in range(repeats)])
    counts = dense(reduced(np.repeat(scores, repeats, 0), at), vocabulary)
    assert (counts.sum(1) == draws).all()
    seen = probabilities * draws * repeats > 50
    spread = counts.std(0)[seen]
    z = (counts.mean(0) - draws * probabilities)[seen] / spread * np.sqrt(repeats)
    assert np.abs(z).max() < 4.5
    likely = probabilities[seen] > 0.05
    assert likely.any()
    relative = (spread / np.sqrt(draws * probabilities * (1 - probabilities))[seen])[likely]
    if how == "independent":
        np.testing.assert_allclose(relative, 1, atol=0.1)
    else:
        assert relative.max() < 0.8
        assert (np.abs(counts - draws * probabilities) < 2).all()  # two cut strata, at most


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1200), st.integers(1, 40), st.integers(1, 60), st.sampled_from(HOW), st.integers(0, 2**40))
def test_picks_what_a_plain_search_picks(vocabulary: int, rows: int, draws: int, how: Draws, seed: int) -> None:
    """Integers as masses, so that sums are exact and both must agree on every draw."""
    draw = np.random.default_rng(seed)
    masses = draw.integers(0, 4, (rows, vocabulary)).astype(np.float32)
    masses[:, draw.integers(vocabulary)] += 1
    at = uniforms(seed, draw.integers(9, size=rows).astype(np.int32), draws, how)
    padded = np.zeros((rows, -(-vocabulary // BLOCK) * BLOCK), np.float32)
    padded[:, :vocabulary] = masses
    blocks = padded.reshape(-1, BLOCK)
    found = pick(Masses(blocks.sum(1).reshape(rows, -1), lambda wanted: blocks[wanted]), at)
    for row in range(rows):
        edges = np.cumsum(masses[row], dtype=np.float64)
        wanted = np.searchsorted(edges, at[row] * edges[-1] * (1 + 1e-15), "right")
        lower = np.searchsorted(edges, at[row] * edges[-1] * (1 - 1e-15), "right")
        assert ((found[row] == wanted) | (found[row] == lower)).all()
        assert (masses[row][found[row]] > 0).all()


@pytest.mark.parametrize("number", [0.0, np.nextafter(1, 0)])
def test_the_ends_of_the_range_hit_tokens_that_have_mass(number: float) -> None:
    scores = np.full((3, 700), -np.inf, np.float32)
    scores[0, 5] = scores[1, 256] = scores[2, 699] = 3
    rows = reduced(scores, np.full((3, 50), number))
    assert rows.ids.tolist() == [5, 256, 699]
    assert rows.counts.tolist() == [50, 50, 50]


@pytest.mark.parametrize("vocabulary", [300, 4096, 40_000, 300_000])
@pytest.mark.parametrize(("kind", "size"), [("sampled", 50), ("top-k", 20), ("full", 0)])
def test_a_row_is_the_same_in_any_batch(kind: str, size: int, vocabulary: int) -> None:
    scores = scores_of(vocabulary, 9)
    ids = np.arange(9, dtype=np.int32)
    at = uniforms(3, ids, 50, "independent")
    reduce = Reducer(kind, size, vocabulary)
    whole = reduce(scores, ids, at)
    again = 30 if vocabulary <= 4096 else 1  # several threads have something to do
    many = Reducer(kind, size, vocabulary, threads=3)(*(np.concatenate([part] * again) for part in (scores, ids, at)))
    for name in Rows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(many, name), getattr(Rows.joined([whole] * again), name), name)
    for cut in (1, 4, 7):
        parts = Rows.joined([reduce(scores[:cut], ids[:cut], at[:cut]), reduce(scores[cut:], ids[cut:], at[cut:])])
        for name in Rows.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), name)


def test_random_numbers_hang_on_seed_tokens_and_position_alone() -> None:
    ids = np.array([1, 2, 3, 4], np.int32)
    known = uniforms(0, ids, 50, "independent")
    assert known[0, :3].tolist() == pytest.approx(KNOWN, abs=0)
    np.testing.assert_array_equal(uniforms(0, ids.astype(np.int64), 50, "independent"), known)
    np.testing.assert_array_equal(uniforms(0, ids, 49, "independent"), known[:, :49])
    assert not np.isin(known, uniforms(1, ids, 50, "independent")).any()
    assert not np.isin(known, uniforms(0, ids[::-1], 50, "independent")).any()
    assert len(np.unique(known)) == known.size
    strata = np.floor(uniforms(0, ids, 50, "stratified") * 50)
    assert (strata == np.arange(50)).all()


KNOWN = [0.8925992748573297, 0.9641364711515193, 0.42775221915941597]
"""They may never change: shards that are collected again must have the same bytes."""


def log_softmax(scores: np.ndarray) -> np.ndarray:
    exact = scores.astype(np.float64)
    highest = exact.max(1, keepdims=True)
    return exact - highest - np.log(np.exp(exact - highest).sum(1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_full_and_the_token_that_came(temperature: float) -> None:
    scores = scores_of(3000, 7)
    scores[0, :10] = 5  # equals
    ids = np.arange(7, dtype=np.int32)
    at = uniforms(0, ids, 1, "independent")
    exact = log_softmax(scores / temperature)
    top = Reducer("top-k", 5, 3000, temperature)(scores, ids, at)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :5]
    assert top.ids[5:].tolist() == order[1:].reshape(-1).tolist()
    assert set(top.ids[:5].tolist()) < set(range(10))
    kept = np.take_along_axis(exact, top.ids.reshape(7, 5), 1)
    np.testing.assert_allclose(top.log_probs, kept.reshape(-1), rtol=1e-3)
    np.testing.assert_allclose(top.tail, np.log(1 - np.exp(kept).sum(1)), rtol=1e-3)
    full = Reducer("full", 0, 3000, temperature)(scores, ids, at)
    np.testing.assert_allclose(full.log_probs, exact, rtol=1e-3)
    plain = log_softmax(scores)
    for rows in (top, full):
        np.testing.assert_allclose(rows.next_log_prob, plain[np.arange(7), ids], rtol=1e-5)
        np.testing.assert_allclose(rows.lse, scores[:, 0] - plain[:, 0], rtol=1e-5)


def test_temperature_flattens_what_is_drawn() -> None:
    scores = np.array([[2.0, 0.0]], np.float32)
    at = np.linspace(0, 1, 1000, endpoint=False)[None]
    counts = Reducer("sampled", 1000, 2, 2.0)(scores, np.zeros(1, np.int32), at).counts
    assert counts[0] == pytest.approx(1000 / (1 + np.exp(-1)), abs=1)


def test_tail_of_a_certain_row_is_empty() -> None:
    rows = Reducer("top-k", 2, 4)(np.array([[50, 0, 0, 0]], np.float32), np.zeros(1, np.int32), np.zeros((1, 1)))
    assert np.isneginf(rows.tail).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    scores = scores_of(300)
    scores[0, 3] = value
    with pytest.raises(DataError, match="not finite"):
        Softmax(300).load(scores)


def test_a_mixture_adds_counts_and_averages_probabilities() -> None:
    scores = scores_of(600, 8), scores_of(600, 8, seed=1)
    ids = np.arange(8, dtype=np.int32)
    at = uniforms(0, ids, 40, "independent")
    parts = [reduced(scores[0], at[:, :30]), reduced(scores[1], at[:, 30:])]
    both = mixture(parts, [0.75, 0.25])
    np.testing.assert_array_equal(dense(both, 600), dense(parts[0], 600) + dense(parts[1], 600))
    assert (np.diff(both.ids)[np.diff(np.repeat(np.arange(8), both.lengths)) == 0] > 0).all()
    wanted = 0.75 * np.exp(parts[0].next_log_prob) + 0.25 * np.exp(parts[1].next_log_prob)
    np.testing.assert_allclose(np.exp(both.next_log_prob), wanted, rtol=1e-5)
