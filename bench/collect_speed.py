"""`gguforge distill collect` against llama.cpp's own prompt processing with all scores on, and nothing else done.

    python3 bench/collect_speed.py model.gguf text.txt

Both read the same documents, by turns, in this process; the plain loop hands llama.cpp batch after batch and looks at
no score. Prints a Markdown table of medians over rounds, by processor time and by the clock, and fails when ours is
slower than 0.85 times its speed by processor time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.collector import Collector, Settings
from gguforge.distill.data import documents, read_corpus
from gguforge.distill.targets import write_manifest
from gguforge.distill.teachers.gguf import GGUFTeacher
from gguforge.runtime.library import library, load_model, new_context

SLOWEST = 0.85
BATCH = 512


class PlainLoop:
    """llama.cpp alone: documents in, scores computed and left where they are."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.llama, self.model = library(), load_model(path)
        self.context = new_context(self.model, path, context=context, threads=threads)
        self.batch = self.llama.llama_batch_init(BATCH, 0, 1)

    def read(self, ids: NDArray[np.int32]) -> None:
        """Evaluate one document from an empty context."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part.tolist()):
                self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, start + i, 1
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            assert self.llama.llama_decode(self.context, self.batch) == 0
            self.llama.llama_get_logits(self.context)  # waits until they are there


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor time and on the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def costs(given: argparse.Namespace, settings: Settings) -> tuple[list[list[tuple[float, float]]], int, float]:
    """Costs of both in every round, tokens, and bytes a token."""
    corpus = read_corpus([given.text], settings.context, settings.text_of_a_shard)
    found: list[list[tuple[float, float]]] = [[], []]
    plain = PlainLoop(Path(given.model), settings.context, given.threads)
    with (
        tempfile.TemporaryDirectory() as name,
        GGUFTeacher.open(given.model, context=settings.context, threads=given.threads) as teacher,
    ):
        folder = Path(name)
        collector = Collector([teacher], [1.0], corpus, settings)
        write_manifest(folder, collector.manifest)
        texts = [ids for shard in corpus.shards for passage in shard
                 for ids, _ in documents(passage, teacher.tokenizer, settings.context)]  # fmt: skip
        tokens = sum(map(len, texts))

        def ours() -> None:
            for number in range(len(corpus.shards)):
                collector.make(number, folder, lambda nbytes, tokens: None)

        for number in range(given.rounds + 1):
            for kept, work in zip(found, (lambda: [plain.read(ids) for ids in texts], ours), strict=True):
                kept.append(measured(work))
            print(f"round {number}: {found[0][-1][1]:.2f} s, {found[1][-1][1]:.2f} s", file=sys.stderr)
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [kept[1:] for kept in found], tokens, nbytes / tokens  # the first round warms up


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when ours is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--independent", action="store_true")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    how = "independent" if given.independent else "stratified"
    both, tokens, nbytes = costs(given, Settings(size=given.draws, draws=how, context=given.context))
    medians = [[statistics.median(column) for column in zip(*kept, strict=True)] for kept in both]
    print(
        f"| {Path(given.model).name}, {tokens} tokens, {given.threads} threads | processor, s | clock, s | tokens/s |"
    )
    print("|---|---|---|---|")
    for name, (processor, clock) in zip(("llama.cpp, all scores on", "distill collect"), medians, strict=True):
        print(f"| {name} | {processor:.2f} | {clock:.2f} | {tokens / clock:.0f} |")
    speed = [their / our for their, our in zip(*medians, strict=True)]
    print(f"| speed of ours | {speed[0]:.2f} | {speed[1]:.2f} | |")
    print(f"\n{nbytes:.1f} bytes a token")
    return 0 if speed[0] >= SLOWEST else 1


if __name__ == "__main__":
    sys.exit(main())
