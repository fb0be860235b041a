"""Types within a budget: against every combination on small problems."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguforge.quant.allocate import Option, allocate, hull
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError

OPTIONS = st.lists(
    st.builds(Option, st.sampled_from([T.Q2_K, T.Q4_K, T.Q6_K]), st.integers(1, 40), st.floats(0, 100)),
    min_size=1, max_size=4,
)  # fmt: skip
PROBLEMS = st.dictionaries(st.sampled_from("abcd"), OPTIONS, min_size=1)


@given(PROBLEMS, st.integers(0, 160))
def test_within_the_budget_and_never_worse_than_any_choice_of_one_step(
    options: dict[str, list[Option]], budget: int
) -> None:
    every = [dict(zip(options, some, strict=True)) for some in product(*options.values())]
    fitting = [some for some in every if sum(option.nbytes for option in some.values()) <= budget]
    if not fitting:
        with pytest.raises(InputError, match="does not fit"):
            allocate(options, budget)
        return
    found = allocate(options, budget)
    assert sum(option.nbytes for option in found.values()) <= budget
    damage = sum(option.damage for option in found.values())
    near = [some for some in fitting if sum(some[name] != found[name] for name in found) <= 1]
    assert damage <= min(sum(option.damage for option in some.values()) for some in near) + 1e-9
    if len(options) <= 2:  # a pair of changes is all there is: then it is the best
        assert damage <= min(sum(option.damage for option in some.values()) for some in fitting) + 1e-9


@given(OPTIONS)
def test_a_hull_gains_less_and_less(options: list[Option]) -> None:
    found = hull(options)
    assert set(found) <= set(options)
    assert found[0].nbytes == min(option.nbytes for option in options)
    assert found[-1].damage == min(option.damage for option in options)
    gains = [(a.damage - b.damage) / (b.nbytes - a.nbytes) for a, b in pairwise(found)]
    assert all(gain > 0 for gain in gains)
    assert gains == sorted(gains, reverse=True)
