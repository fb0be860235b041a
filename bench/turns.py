"""Runs two programs by turns on the same work, and compares what they take.

By turns, so that a change of the machine's pace meets both. Beside the time on the clock stands the processor time,
which other programs on the machine disturb less; and the peak of resident memory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds on the clock, seconds of processor time, bytes of memory at the peak."""

    clock: float
    processor: float
    memory: int


def run(words: Sequence[object]) -> tuple[Cost, str]:
    """Run a program to its end; its cost and everything it printed. A program that fails ends the benchmark."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, words)), stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        clock = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{words[0]} failed:\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(clock, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit), text


def by_turns(theirs: Sequence[object], ours: Sequence[object], rounds: int) -> tuple[list[Cost], list[Cost]]:
    """Costs of so many runs of each."""
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for number in range(rounds):
        for words, found in zip((theirs, ours), costs, strict=True):
            found.append(run(words)[0])
        clocks = [f"{found[-1].clock:.2f} s" for found in costs]
        print(f"round {number + 1}: theirs {clocks[0]}, ours {clocks[1]}", file=sys.stderr)
    return costs


def table(work: str, names: tuple[str, str], costs: tuple[list[Cost], list[Cost]]) -> str:
    """A Markdown table of medians, and the ratios of ours to theirs."""
    medians = [
        [statistics.median(getattr(cost, name) for cost in found) for name in ("clock", "processor", "memory")]
        for found in costs
    ]
    lines = [f"| {work} | clock, s | processor, s | peak memory, MB |", "|---|---|---|---|"]
    for name, (clock, processor, memory) in zip(names, medians, strict=True):
        lines.append(f"| {name} | {clock:.2f} | {processor:.2f} | {memory / 1e6:.0f} |")
    ratios = [our / their for their, our in zip(*medians, strict=True)]
    lines.append("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def processor_ratio(costs: tuple[list[Cost], list[Cost]]) -> float:
    """Ours to theirs, medians."""
    their, our = (statistics.median(cost.processor for cost in found) for found in costs)
    return our / their
