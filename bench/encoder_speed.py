"""Encoders of the block types against ggml's own: weights a second on one core, same weights, same bytes out.

    python3 bench/encoder_speed.py [--types Q4_K,Q6_K] [--rounds 9] [--importance none|random|both]

Both run by turns in this process: `encode`, and `ggml_quantize_chunk` of the installed llama-cpp-python, on a slab of
the size that the writer hands out (256 Ki weights), as often as makes a turn long enough to time. Times are processor
times, speeds are medians over the rounds, the ratio is the median of the rounds' ratios. Prints a Markdown table; a
dash stands where a type needs importance weights or ignores them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks import REGISTRY, encode
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.runtime.tensors import ggml

ROWS, LENGTH = 64, 4096  # a slab
TURN = 0.03  # seconds that a turn takes at least
Floats = NDArray[np.float32]


def their_encoder(x: Floats, type: T, weights: Floats | None) -> Callable[[], NDArray[np.uint8]]:
    """A call of ggml's encoder."""
    size, nbytes = GGML_QUANT_SIZES[type]
    out = np.zeros((len(x), x.shape[1] // size * nbytes), np.uint8)
    function = ggml().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    importance = None if weights is None else weights.ctypes.data

    def call() -> NDArray[np.uint8]:
        function(int(type), x.ctypes.data, out.ctypes.data, 0, *x.shape, importance)
        return out

    return call


def seconds(call: Callable[[], object], times: int) -> float:
    """Processor time of one call."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def compare(type: T, weights: Floats | None, rounds: int) -> str:
    """Three cells of the table: millions of weights a second, ours and theirs, and the ratio."""
    x = np.random.default_rng(0).standard_normal((ROWS, LENGTH), np.float32) * np.float32(0.02)
    calls = (lambda: encode(x, type, weights)), their_encoder(x, type, weights)
    if not np.array_equal(*(call() for call in calls)):
        raise SystemExit(f"{type.name}: the bytes differ")
    times = [max(1, round(TURN / max(1e-6, seconds(call, 1)))) for call in calls]
    found = [[seconds(call, count) for call, count in zip(calls, times, strict=True)] for _ in range(rounds)]
    ours, theirs = (x.size / statistics.median(side) / 1e6 for side in zip(*found, strict=True))
    ratio = statistics.median(their / our for our, their in found)
    return f"{ours:.4g} | {theirs:.4g} | {ratio:.2f}x"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(kind.name for kind in sorted(REGISTRY) if kind != T.F32))
    parser.add_argument("--importance", choices=["none", "random", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    weights = np.random.default_rng(1).random(LENGTH, np.float32)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"Millions of weights a second, one core; {given.rounds} rounds by turns; load when it began: {load:.1f}.\n")
    print("| type | gguforge | ggml | speed | with importance: gguforge | ggml | speed |")
    print("|---|---|---|---|---|---|---|")
    for kind in (T[name] for name in given.types.split(",")):
        cells = [kind.name]
        for name, importance in (("none", None), ("random", weights)):
            absent = REGISTRY[kind].required if importance is None else REGISTRY[kind].importance == "ignored"
            measured = given.importance in (name, "both") and not absent
            cells.append(compare(kind, importance, given.rounds) if measured else "– | – | –")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
