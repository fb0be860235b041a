"""Files that stand in for models that do not exist yet: a plan with random weights, or without any.

They take the memory and the time of the real ones: neither depends on what the weights are.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from gguforge.quant.blocks import block_type
from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguforge.quant.plan import Plan
from gguforge.quant.sources import Bytes, Source
from gguforge.quant.writer import write
from gguforge.runtime.memory import Buffers, buffers

BLOCKS = 32  # different blocks of a type, which are repeated
SPREAD = 0.02  # standard deviation of weights, as models begin with


@dataclass(frozen=True)
class RandomWeights(Source):
    """Blocks of random weights, over and over."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType

    def raw_rows(self, start: int, stop: int) -> Bytes:
        found: Bytes = np.resize(_tile(self.type), (stop - start, self.row_bytes))
        return found


@lru_cache(maxsize=64)
def _tile(type: GGMLQuantizationType) -> Bytes:
    length = BLOCKS * GGML_QUANT_SIZES[type][0]
    weights = np.random.default_rng(0).normal(0, SPREAD, (1, length)).astype(np.float32)
    return block_type(type).encode(weights, np.ones(length, np.float32)).reshape(-1)


def write_random(plan: Plan, path: Path, workers: int | None = None) -> None:
    """Write the file of a plan with random weights in place of its sources.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = [replace(one, source=RandomWeights(one.shape, one.type), importance=None) for one in plan.tensors]
    write(Plan(plan.metadata, tuple(tensors), plan.alignment), path, workers=workers, overwrite=True)


def buffers_of(plan: Plan, context: int, cache_type: str = "f16") -> Buffers:
    """What a context takes beside the weights of a plan: llama.cpp's dry run on a file of holes.

    Raises:
        EngineError: llama.cpp cannot run such a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.gguf"
        with path.open("wb") as file:
            file.write(plan.header)
            file.truncate(plan.size)
        return buffers(path, context, cache_type)
