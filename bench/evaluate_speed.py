"""`gguforge evaluate` against llama-perplexity, on the same model, text, chunks and threads.

    python3 bench/evaluate_speed.py model.gguf text.txt --llama-perplexity path/to/llama-perplexity

Prints a Markdown table and both perplexities. Fails when ours is slower than 0.9 times its speed, by processor time,
or the perplexities differ by 0.1 %. With --reference model-f16.gguf both also measure the divergence from it:
llama-perplexity in two runs over a file, which are added up, ours in one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from turns import Cost, by_turns, processor_ratio, run, table

SLOWEST, LARGEST = 1 / 0.9, 1e-3


def perplexities(theirs: list[object], ours: list[object]) -> tuple[float, float]:
    """What both print."""
    match = re.search(r"Final estimate: PPL = ([\d.]+)", run(theirs)[1])
    assert match is not None
    return float(match[1]), float(json.loads(run([*ours, "--json"])[1])["perplexity"]["value"])


def divergence_costs(
    theirs: list[object], model: str, ours: list[object], reference: str, rounds: int
) -> tuple[list[Cost], list[Cost]]:
    """llama-perplexity's two runs together, and our one."""
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        base = ["--kl-divergence-base", Path(folder) / "base.kld"]
        for _ in range(rounds):
            two = [run([*theirs, "-m", reference, *base])[0], run([*theirs, "-m", model, *base, "--kl-divergence"])[0]]
            clock, processor = sum(cost.clock for cost in two), sum(cost.processor for cost in two)
            costs[0].append(Cost(clock, processor, max(cost.memory for cost in two)))
            costs[1].append(run([*ours, "--against", reference])[0])
    return costs


def main() -> int:
    """Measure and print; 1 when ours is too slow or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--llama-perplexity", required=True)
    parser.add_argument("--reference")
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    shared = ["-f", given.text, "--chunks", given.chunks, "-t", given.threads]
    theirs: list[object] = [given.llama_perplexity, *shared]
    ours: list[object] = [sys.executable, "-m", "gguforge.cli", "evaluate", given.model, *shared]
    costs = by_turns([*theirs, "-m", given.model], ours, given.rounds)
    work = f"{Path(given.model).name}, {given.chunks} chunks of 512, {given.threads} threads"
    print(table(work, ("llama-perplexity", "gguforge evaluate"), costs))
    their, our = perplexities([*theirs, "-m", given.model], ours)
    print(f"\nPerplexity: llama-perplexity {their:.4f}, gguforge {our:.4f}")
    if given.reference is not None:
        both = divergence_costs(theirs, given.model, ours, given.reference, given.rounds)
        print("\n" + table(f"{work}, against {Path(given.reference).name}", ("two runs", "one run"), both))
    return 0 if processor_ratio(costs) <= SLOWEST and abs(our / their - 1) < LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
