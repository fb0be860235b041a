"""The rows by which a tensor's error is judged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gguforge.quant.blocks import decode, encode
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.relative_error import LEAST, SAMPLE, _stripes
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 16))
def test_rows_from_everywhere_and_none_twice(rows: int, row_length: int) -> None:
    stripes = list(_stripes(rows, row_length))
    count = sum(stop - start for start, stop in stripes)
    assert stripes[0][0] >= 0
    assert stripes[-1][1] <= rows
    assert all(a[1] <= b[0] for a, b in pairwise(stripes))
    assert count <= max(LEAST, SAMPLE // row_length)
    assert count == rows or count > max(LEAST, SAMPLE // row_length) // 2
    gaps = [b[0] - a[1] for a, b in pairwise([(0, 0), *stripes, (rows, rows)])]
    assert max(gaps) <= rows // len(stripes) + 1


def test_a_large_tensor_by_its_sample(tmp_path: Path) -> None:
    """Near the error of all rows; zeros and copies have none."""
    numbers = np.random.default_rng(0).standard_normal((2000, 64), np.float32)
    zeros = np.zeros_like(numbers)
    tensors = [TensorPlan(name, x.shape, T.Q4_0, ArraySource(x)) for name, x in (("a", numbers), ("b", zeros))]
    tensors.append(TensorPlan("c", numbers.shape, T.F32, ArraySource(numbers)))
    written = write(Plan({}, tuple(tensors)), tmp_path / "m.gguf", workers=1)
    error = decode(encode(numbers, T.Q4_0), T.Q4_0) - numbers
    full = np.sqrt(np.square(error).mean() / np.square(numbers).mean())
    found, nothing, copied = written.errors
    assert found is not None
    assert abs(found / full - 1) < 0.03
    assert (nothing, copied) == (0, 0)
