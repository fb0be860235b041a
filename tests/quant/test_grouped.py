"""Evenly spaced blocks opened up: their levels come out and go in again, and nothing else of them changes."""

from __future__ import annotations

import numpy as np
import pytest

from gguforge.quant.blocks import REGISTRY
from gguforge.quant.blocks.grouped import GroupedBlock

GROUPED = [kind for kind in REGISTRY.values() if issubclass(kind, GroupedBlock)]


@pytest.fixture(params=GROUPED, ids=lambda kind: kind.type.name)
def kind(request: pytest.FixtureRequest) -> type[GroupedBlock]:
    found: type[GroupedBlock] = request.param
    return found


def random_blocks(kind: type[GroupedBlock], seed: int) -> np.ndarray:
    """Blocks of random bytes with finite scales."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (64, kind.layout.itemsize), dtype=np.uint8).view(kind.layout)[:, 0]
    for field in kind.layout.names or ():
        if kind.layout[field].kind == "f":
            blocks[field] = generator.standard_normal(64)
    return blocks


def test_levels_are_within_their_bounds(kind: type[GroupedBlock]) -> None:
    encoded = kind.encode(np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32))
    levels = kind.levels(encoded.reshape(-1).view(kind.layout))
    assert (levels.min(), levels.max()) == (kind.low, kind.high)


def test_moved_levels_decode_to_step_times_level_less_minimum(kind: type[GroupedBlock]) -> None:
    blocks, generator = random_blocks(kind, 1), np.random.default_rng(2)
    wanted = generator.integers(kind.low, kind.high + 1, (64, kind.size)).astype(np.int8)
    before = blocks.copy()
    kind.put_levels(wanted, blocks)
    assert (kind.levels(blocks) == wanted).all()
    step, minimum = kind.steps(blocks)
    assert (kind.steps(before)[0] == step).all()
    expected = step.repeat(kind.group, axis=1) * wanted
    if minimum is not None:
        expected -= minimum.repeat(kind.group, axis=1)
    assert np.array_equal(kind.decode(blocks.view(np.uint8)).reshape(64, -1), expected)


def test_levels_put_back_leave_every_byte(kind: type[GroupedBlock]) -> None:
    blocks = random_blocks(kind, 5)
    before = blocks.tobytes()
    kind.put_levels(kind.levels(blocks), blocks)
    assert blocks.tobytes() == before
