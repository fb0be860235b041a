"""Text generation of `gguforge chat` against llama.cpp's own llama-bench, on the same file and threads.

    python3 bench/chat_speed.py model.gguf --llama-bench path/to/llama-bench

The two run by turns, so that a change of the machine's pace meets both. llama-bench times bare evaluations of random
tokens (tg); ours is the whole chat: evaluation, sampling with the default settings, text. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from gguforge.runtime.chat import ChatSession
from gguforge.runtime.engine import Engine
from gguforge.runtime.machine import physical_cores
from gguforge.runtime.sampling import Sampling

TARGET = 0.97


def llama_bench_speed(program: str, model: str, threads: int, tokens: int) -> float:
    """Tokens a second of llama-bench's tg test."""
    words = [program, "-m", model, "-t", threads, "-p", 0, "-n", tokens, "-r", 1, "-ngl", 0, "-o", "json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def chat_speed(engine: Engine, tokens: int) -> float:
    """Tokens a second of an answer, or of several where the model ends them early, sampling and text included."""
    generated, seconds = 0, 0.0
    with ChatSession(engine, sampling=Sampling(seed=1), max_tokens=tokens) as session:
        while generated < tokens:
            session.clear()
            for _ in session.ask("Tell me a very long story."):
                pass
            generated += session.stats.generated_tokens - 1
            seconds += session.stats.generation_seconds
            if session.stats.stop == "length":
                break
    return generated / seconds


def spread(speeds: list[float]) -> str:
    """Median, and from the slowest round to the fastest."""
    return f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"


def main() -> int:
    """Measure and print; 1 when the chat is slower than it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    theirs: list[float] = []
    ours: list[float] = []
    with Engine.open(given.model, threads=given.threads) as engine:
        print(f"{engine.describe()} · {given.threads} threads · {given.tokens} tokens", file=sys.stderr)
        chat_speed(engine, 16)  # pages in the weights
        for number in range(given.rounds):
            theirs.append(llama_bench_speed(given.llama_bench, given.model, given.threads, given.tokens))
            ours.append(chat_speed(engine, given.tokens))
            print(f"round {number + 1}: llama-bench {theirs[-1]:.2f}, chat {ours[-1]:.2f} tok/s", file=sys.stderr)
        ratio = statistics.median(ours) / statistics.median(theirs)
        print("| model | threads | llama-bench tg, tok/s (median) | gguforge chat, tok/s (median) | ratio |")
        print("|---|---|---|---|---|")
        model = f"{engine.describe()}, {engine.file.size / 1e6:.0f} MB"
        print(f"| {model} | {given.threads} | {spread(theirs)} | {spread(ours)} | {ratio:.3f} |")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
