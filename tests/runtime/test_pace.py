"""The speed of a machine from a few measured models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quantize import plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.rules import Overrides
from gguforge.quant.sources import ArraySource
from gguforge.runtime.memory import buffers
from gguforge.runtime.pace import MINIMUM, Pace, Point, bytes_per_token, measure_decoding
from gguforge.runtime.stand_in import buffers_of, write_random

points = st.lists(st.builds(Point, st.integers(1, 10**11), st.floats(1e-6, 1e3)), min_size=1, max_size=5)


def test_a_constant_and_a_bandwidth_are_found_again() -> None:
    pace = Pace("Q4_0", 1, tuple(Point(size, 0.002 + size / 5e9) for size in (10**8, 4 * 10**8, 10**9)))
    constant, slope = pace.line
    assert (constant, 1 / slope) == pytest.approx((0.002, 5e9))
    assert pace.speed(2 * 10**9) == pytest.approx(1 / 0.402)
    slower = pace.corrected(Point(10**9, 2 * 0.202))
    assert slower.seconds(10**9) == pytest.approx(0.404)


@given(points)
def test_more_bytes_never_take_less_time(found: list[Point]) -> None:
    constant, slope = Pace("Q4_0", 1, tuple(found)).line
    assert constant >= 0
    assert slope > 0


def test_a_measurement_is_kept_in_a_file(tmp_path: Path) -> None:
    pace = Pace("Q4_0", 3, (Point(10, 0.5), Point(20, 0.75)))
    pace.save(tmp_path / "m.json")
    assert Pace.load(tmp_path / "m.json") == pace
    good = (tmp_path / "m.json").read_text()
    for bad in ("", "[]", "{}", good.replace("0.5", "0"), good.replace('"points"', '"p"'), good.replace("0.5", '"x"')):
        (tmp_path / "m.json").write_text(bad)
        with pytest.raises(InputError, match="is no measurement of a machine"):
            Pace.load(tmp_path / "m.json")


def test_tables_of_which_a_token_needs_one_row_are_not_read() -> None:
    def tensor(name: str, rows: int) -> TensorPlan:
        return TensorPlan(name, (rows, 4), T.F32, ArraySource(np.zeros((rows, 4), np.float32)))

    tied = [tensor("token_embd.weight", 8), tensor("position_embd.weight", 5), tensor("blk.0.ffn_up.weight", 2)]
    assert bytes_per_token(Plan({}, tuple(tied))) == 16 * (8 + 2)
    assert bytes_per_token(Plan({}, (*tied, tensor("output.weight", 8)))) == 16 * (8 + 2)


def test_stand_ins_have_the_sizes_and_needs_of_the_file_and_run(random_path: Path, tmp_path: Path) -> None:
    plan = retype(plan_of_file(read_gguf(random_path)), "Q8_0", overrides=Overrides(pure=True))
    write_random(plan, tmp_path / "stand-in.gguf", workers=1)
    made = read_gguf(tmp_path / "stand-in.gguf")
    assert made.size == plan.size
    assert [(t.name, t.type) for t in made.tensors] == [(t.name, t.type) for t in plan.tensors]
    for tensor in plan_of_file(made).tensors:
        rows = tensor.source.rows(0, tensor.rows)
        assert np.isfinite(rows).all()
        assert rows.any()
    assert buffers_of(plan, 256) == buffers(tmp_path / "stand-in.gguf", 256)
    assert 0 < measure_decoding(tmp_path / "stand-in.gguf", threads=1, seconds=0) < 1
    assert MINIMUM > 1
