"""Text generation of `gguforge chat` against llama.cpp's own llama-bench, on the same file and threads.

    python3 bench/chat_speed.py model.gguf --llama-bench path/to/llama-bench

The two run by turns, each loading the model anew, so that a change of the machine's pace and the luck of where the
weights come to lie meet both. llama-bench times bare evaluations of random tokens (tg) at the depth at which the chat's
answer begins; ours is the whole chat: evaluation, sampling with the default settings, text. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from gguforge.runtime.chat import ChatSession
from gguforge.runtime.engine import Engine
from gguforge.runtime.machine import physical_cores
from gguforge.runtime.sampling import Sampling

TARGET = 0.97


def llama_bench_speed(program: str, model: str, threads: int, tokens: int, depth: int) -> float:
    """Tokens a second of llama-bench's tg test after `depth` tokens."""
    words = [program, "-m", model, "-t", threads, "-p", 0, "-n", tokens, "-d", depth, "-r", 1, "-ngl", 0, "-o", "json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def chat_speed(model: str, threads: int, tokens: int) -> tuple[float, int]:
    """Tokens a second of an answer (of several where the model ends them early), and tokens before it."""
    generated, seconds, depth = 0, 0.0, 0
    with (
        Engine.open(model, threads=threads) as engine,
        ChatSession(engine, sampling=Sampling(seed=1), max_tokens=tokens) as session,
    ):
        while generated < tokens - 1:
            session.clear()
            for _ in session.ask("Tell me a very long story."):
                pass
            generated += session.stats.generated_tokens - 1
            seconds += session.stats.generation_seconds
            depth = session.stats.prompt_tokens
    return generated / seconds, depth


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
    _, depth = chat_speed(given.model, given.threads, 8)  # brings the weights into memory
    theirs: list[float] = []
    ours: list[float] = []
    for number in range(given.rounds):
        theirs.append(llama_bench_speed(given.llama_bench, given.model, given.threads, given.tokens, depth))
        ours.append(chat_speed(given.model, given.threads, given.tokens)[0])
        print(f"round {number + 1}: llama-bench {theirs[-1]:.2f}, chat {ours[-1]:.2f} tok/s", file=sys.stderr)
    ratio = statistics.median(ours) / statistics.median(theirs)
    name, megabytes = Path(given.model).name, Path(given.model).stat().st_size / 1e6
    print("| model | threads | llama-bench tg, tok/s (median) | gguforge chat, tok/s (median) | ratio |")
    print("|---|---|---|---|---|")
    print(f"| {name}, {megabytes:.0f} MB | {given.threads} | {spread(theirs)} | {spread(ours)} | {ratio:.3f} |")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
