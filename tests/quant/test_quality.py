"""The plan of the better search: the same file but for the blocks of k-quants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguforge.quant.blocks import block_type
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import DataError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quality import EncodedSource, RefinedSource, refine_plan
from gguforge.quant.search.refine import refined
from gguforge.quant.sources import ArraySource, FileSource
from gguforge.quant.writer import write


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_only_k_quants_that_are_encoded_change() -> None:
    tensors = tuple(
        TensorPlan(type.name, (4, 256), type, ArraySource(array(4, 256))) for type in (T.F32, T.Q8_0, T.Q4_K, T.IQ4_XS)
    )
    plan = Plan({}, tensors)
    better = refine_plan(plan)
    assert better.header == plan.header
    changed = [one.name for one, other in zip(plan.tensors, better.tensors, strict=True) if one is not other]
    assert changed == ["Q4_K"]


def test_each_matrix_has_its_importance() -> None:
    x, w = array(3, 4, 256), np.abs(array(3, 256))
    source = RefinedSource(ArraySource(x), T.Q3_K, w)
    wanted = np.concatenate([refined(x[i], T.Q3_K, w[i]) for i in range(3)])
    np.testing.assert_array_equal(source.raw_rows(0, 12), wanted)
    np.testing.assert_array_equal(source.raw_rows(3, 9), wanted[3:9])


def test_a_written_file_holds_what_the_search_found(tmp_path: Path) -> None:
    x = array(8, 512)
    plan = refine_plan(Plan({}, (TensorPlan("a", x.shape, T.Q2_K, ArraySource(x)),)))
    write(plan, tmp_path / "a.gguf", workers=1)
    assert (tmp_path / "a.gguf").read_bytes()[len(plan.header) :][: 8 * 168] == refined(x, T.Q2_K).tobytes()


def test_infinity_is_refused() -> None:
    x = array(2, 256)
    x[1, 3] = np.inf
    with pytest.raises(DataError, match="NaN or infinity"):
        RefinedSource(ArraySource(x), T.Q4_K).raw_rows(0, 2)


def test_encoded_blocks_are_read_from_their_own_file(tmp_path: Path) -> None:
    data = block_type(T.Q6_K).encode(array(5, 256))
    data.tofile(tmp_path / "0.blocks")
    source = EncodedSource(ArraySource(array(5, 256)), FileSource(str(tmp_path / "0.blocks"), 0, (5, 256), T.Q6_K))
    np.testing.assert_array_equal(source.raw_rows(1, 4), data[1:4])
    assert source.paths == ()
