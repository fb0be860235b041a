"""Blocks taken apart are the blocks put together again, and stand for the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.fields import RANGES, pack, unpack
from gguforge.quant.constants import GGMLQuantizationType as T

TYPES = list(RANGES)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_blocks_of_random_bytes_come_back(type: T) -> None:
    kind = block_type(type)
    draw = np.random.default_rng(3)
    blocks = draw.integers(0, 256, 64 * kind.layout.itemsize, np.uint8).view(kind.layout)
    for name in ("d", "dmin"):
        if name in (kind.layout.names or ()):
            blocks[name] = draw.standard_normal(64)
    fields = unpack(blocks, type)
    assert pack(fields).tobytes() == blocks.tobytes()
    np.testing.assert_array_equal(fields.values().T, kind.decode(blocks.view(np.uint8).reshape(64, -1)))


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_numbers_stay_in_range(type: T) -> None:
    kind, range = block_type(type), RANGES[type]
    blocks = np.random.default_rng(4).integers(0, 256, 256 * kind.layout.itemsize, np.uint8).view(kind.layout)
    fields = unpack(blocks, type)
    assert (fields.level.min(), fields.level.max()) == range.level
    assert (fields.scale.min(), fields.scale.max()) == range.scale
    assert fields.minimum.max() == range.minimum
