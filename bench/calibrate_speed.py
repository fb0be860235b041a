"""`gguforge calibrate` against llama-imatrix, on the same model, text, chunks and threads.

    python3 bench/calibrate_speed.py model-f16.gguf text.txt --llama-imatrix path/to/llama-imatrix

Prints a Markdown table and the largest relative difference of the two importance matrices. llama-imatrix runs with
--no-ppl, since ours computes no perplexity either. Fails when ours takes more than 1.15 times its processor time, or
an entry differs by 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from turns import by_turns, processor_ratio, table

from gguforge.quant.imatrix import ImportanceMatrix, read_imatrix

SLOWEST, LARGEST = 1.15, 1e-3


def largest_difference(theirs: ImportanceMatrix, ours: ImportanceMatrix) -> float:
    """Of any entry, relative to theirs; infinite when tensors, counts or zeros differ."""
    if list(theirs.entries) != list(ours.entries):
        return float("inf")
    largest = 0.0
    for name, entry in theirs.entries.items():
        other = ours.entries[name]
        there = entry.sums > 0
        if not np.array_equal(entry.counts, other.counts) or other.sums[~there].any():
            return float("inf")
        largest = max(largest, float(np.abs(other.sums[there] / entry.sums[there] - 1).max(initial=0)))
    return largest


def main() -> int:
    """Measure and print; 1 when ours is too slow or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--llama-imatrix", required=True)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("theirs.gguf", "ours.gguf")]
        shared = ["-f", given.text, "--chunks", given.chunks, "-t", given.threads, "-o"]
        theirs = [given.llama_imatrix, "-m", given.model, "--no-ppl", *shared, files[0]]
        ours = [sys.executable, "-m", "gguforge.cli", "calibrate", given.model, "--overwrite", *shared, files[1]]
        costs = by_turns(theirs, ours, given.rounds)
        difference = largest_difference(*map(read_imatrix, files))
    work = f"{Path(given.model).name}, {given.chunks} chunks of 512, {given.threads} threads"
    print(table(work, ("llama-imatrix", "gguforge calibrate"), costs))
    print(f"\nLargest relative difference of an entry: {difference:.1e}")
    return 0 if processor_ratio(costs) <= SLOWEST and difference < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
