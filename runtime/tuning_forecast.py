"""What tuning a model will take: measured on one chunk of text through one block, and on a few rows of each matrix."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguforge.quant.feedback import ROWS, damped, encode_with_feedback
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import UNQUANTIZED
from gguforge.quant.roles import layer
from gguforge.quant.writer import write
from gguforge.runtime.blocks import BlockRunner, block_count, block_plan
from gguforge.runtime.forward import Tokens
from gguforge.runtime.machine import physical_cores
from gguforge.runtime.tune import unquantized

FEW = 128  # rows that are encoded to know the pace
BASE = 200 << 20  # bytes of Python, NumPy and llama.cpp
ARRAYS = 8  # float32 arrays of the size of the rows that are encoded at once

Pace = dict[tuple[object, int], tuple[float, float]]


@dataclass(frozen=True)
class TuningForecast:
    """What `tune` will take.

    Attributes:
        seconds: of the whole.
        memory: bytes at the most, beside the model's file, which is mapped and can leave the memory again.
        disk: bytes in the tuning folder.
    """

    seconds: float
    memory: int
    disk: int


def forecast_tuning(
    plan: Plan, chunks: Tokens, *, sequential: bool = True, threads: int | None = None
) -> TuningForecast:
    """Run the first block on one chunk, encode a few rows of its matrices, and multiply.

    Args:
        plan, chunks, sequential, threads: see `tune`.

    Raises:
        GGUForgeError: llama.cpp does not run the model.
    """
    count, matrices = block_count(plan), [tensor for tensor in plan.tensors if _is_tuned(tensor)]
    with tempfile.TemporaryDirectory(prefix="gguforge-") as folder:
        stages, chunk, width = _time_of_chunk(plan, chunks, Path(folder), threads or physical_cores())
    passes = (stages + 1) * (1 + sequential)  # for each stage, and once to hand states on
    pace: Pace = {}
    seconds = count * passes * len(chunks) * chunk + sum(_time_of_matrix(tensor, pace) for tensor in matrices)
    block = max(sum(4 * t.elements for t in plan.tensors if layer(t.name) == number) for number in range(count))
    widest = max((tensor.row_length for tensor in matrices), default=0)
    most = max((tensor.elements for tensor in matrices), default=0)
    moments = 3 * 4 * widest**2 + 3 * 8 * widest**2  # sums in single precision, factors in double
    encoding = 4 * ARRAYS * ROWS * widest + 2 * 4 * most
    states = (1 + sequential) * 2 * 4 * chunks.size * width
    return TuningForecast(seconds, BASE + 2 * block + moments + encoding, states + plan.size + 2 * block)


def _is_tuned(tensor: TensorPlan) -> bool:
    return not tensor.is_copy and tensor.type not in UNQUANTIZED and len(tensor.shape) == 2


def _time_of_chunk(plan: Plan, chunks: Tokens, folder: Path, threads: int) -> tuple[int, float, int]:
    """Stages of the first block, seconds that a chunk takes, and the width of hidden states."""
    write(block_plan(unquantized(plan), 0), folder / "block.gguf", workers=1)
    size = chunks.shape[1]
    with BlockRunner(folder / "block.gguf", layer=0, head=False, chunk=size, width=0, threads=threads) as runner:
        stages = runner.survey(chunks[0])
        start = time.perf_counter()
        output = runner.run(chunks[0], stages[-1], output=True).output
        seconds = time.perf_counter() - start
        inputs = np.ones((size, output.shape[1] if output is not None else 1), np.float32)
        start = time.perf_counter()
        inputs.T @ inputs
        seconds += time.perf_counter() - start
    return len(stages), seconds, inputs.shape[1]


def _time_of_matrix(tensor: TensorPlan, pace: Pace) -> float:
    """Seconds of encoding: some for the columns, some for each row."""
    kind = tensor.type, tensor.row_length
    if kind not in pace:
        few = min(FEW, tensor.rows)
        weights = tensor.source.rows(0, few)
        moments = damped(weights.T @ weights)
        times = []
        for rows in (max(1, few // 4), few):
            start = time.perf_counter()
            encode_with_feedback(weights[:rows], moments, tensor.type)
            times.append(time.perf_counter() - start)
        each = max(0.0, (times[1] - times[0]) / max(1, few - few // 4))
        pace[kind] = max(0.0, times[1] - each * few), each
    fixed, each = pace[kind]
    return fixed + each * tensor.rows
