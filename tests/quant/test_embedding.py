"""The embedding's errors go where the first block does not look."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gguforge.quant.blocks import decode, encode
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.embedding import embedding_moments
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quality import refine_plan
from gguforge.quant.sources import ArraySource

WIDTH = 256


def model(**arrays: np.ndarray) -> Plan:
    """A plan of float32 tensors, and the embedding as Q4_K."""
    tensors = (TensorPlan(name, array.shape, T.F32, ArraySource(array)) for name, array in arrays.items())
    return Plan({}, tuple(replace(one, type=T.Q4_K) if "embd" in one.name else one for one in tensors))


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(9)
    shapes = {"token_embd": (40, WIDTH), "blk.0.attn_q": (64, WIDTH), "blk.0.attn_k": (32, WIDTH)}
    found = {f"{name}.weight": draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"blk.0.attn_norm.weight": draw.lognormal(0, 1, WIDTH).astype(np.float32)}


def test_queries_change_less() -> None:
    given = arrays()
    x, plan = given["token_embd.weight"], refine_plan(model(**given))
    query = given["blk.0.attn_q.weight"] * given["blk.0.attn_norm.weight"]
    found = decode(plan.tensors[0].source.raw_rows(0, 40), T.Q4_K)
    plain = decode(encode(x, T.Q4_K), T.Q4_K)
    errors = [float(np.square((data - x) @ query.T).sum()) for data in (plain, found)]
    assert errors[1] < 0.4 * errors[0]
    assert np.square(found - x).sum() < 4 * np.square(plain - x).sum()


def test_rows_hardly_depend_on_each_other() -> None:
    """Sums of products are rounded otherwise for another number of rows, and all rows stop when their sum does."""
    given = arrays()
    source, moments = refine_plan(model(**given)).tensors[0].source, embedding_moments(model(**given))
    assert moments is not None
    rows = given["token_embd.weight"][8:16]
    gaps = [decode(data, T.Q4_K) - rows for data in (source.raw_rows(0, 40)[8:16], source.raw_rows(8, 16))]
    errors = [float(np.einsum("ij,jk,ik->", gap, moments, gap)) for gap in gaps]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.01)


def test_without_a_known_reader_there_are_no_moments() -> None:
    given = arrays()
    assert embedding_moments(model(**given)) is not None
    del given["blk.0.attn_norm.weight"]
    assert embedding_moments(model(**given)) is None
    given["blk.0.attn_norm.weight"] = np.zeros(WIDTH, np.float32)
    assert embedding_moments(model(**given)) is None
