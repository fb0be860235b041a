"""`gguforge quantize` against llama.cpp's own llama-quantize: same input, same threads, same bytes out.

    python3 bench/quantize_speed.py --llama-quantize path/to/llama-quantize

Makes a random Llama model (by default 0.9 GB of BF16), then runs both by turns, so that a change of the machine's pace
meets both; every pair of outputs is compared byte for byte. Prints a Markdown table of medians over the rounds: wall
time, CPU time, peak resident memory of the largest process.
"""

from __future__ import annotations

import argparse
import filecmp
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguforge.quant.metadata import float32, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds of wall and CPU time, bytes of peak resident memory."""

    wall: float
    cpu: float
    memory: int


def make_model(path: Path, layers: int, hidden: int, ffn: int, vocabulary: int) -> None:
    """A Llama of random weights, stored as BF16."""
    metadata = {
        "general.architecture": string("llama"),
        "llama.block_count": uint32(layers),
        "llama.context_length": uint32(512),
        "llama.embedding_length": uint32(hidden),
        "llama.feed_forward_length": uint32(ffn),
        "llama.attention.head_count": uint32(16),
        "llama.attention.head_count_kv": uint32(4),
        "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
        "llama.rope.dimension_count": uint32(hidden // 16),
        "llama.vocab_size": uint32(vocabulary),
        "tokenizer.ggml.model": string("none"),
    }
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    shapes["output.weight"] = (vocabulary, hidden)
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (hidden // 4, hidden), "attn_v": (hidden // 4, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
    }  # fmt: skip
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}.weight": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in matrices.items()}
    rng = np.random.default_rng(0)
    pool = {shape: (rng.standard_normal(shape, np.float32) * np.float32(0.02)) for shape in set(shapes.values())}
    tensors = (
        TensorPlan(name, shape, T.F32 if len(shape) == 1 else T.BF16, ArraySource(pool[shape]))
        for name, shape in shapes.items()
    )
    write(Plan(metadata, tuple(tensors)), path, overwrite=True)


def run(words: list[str]) -> Run:
    """Run a program to its end."""
    start = time.perf_counter()
    null = os.open(os.devnull, os.O_RDWR)
    streams = [(os.POSIX_SPAWN_DUP2, null, stream) for stream in (0, 1, 2)]
    process = os.posix_spawn(words[0], words, os.environ, file_actions=streams)
    _, status, usage = os.wait4(process, 0)
    os.close(null)
    if status:
        raise SystemExit(f"failed with {os.waitstatus_to_exitcode(status)}: {' '.join(words)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale)


def make_imatrix(model: Path, path: Path) -> None:
    """An importance matrix of random positive weights."""
    rng = np.random.default_rng(1)
    names = {
        t.name: t.shape[-1] for t in read_gguf(model).tensors if len(t.shape) == 2 and t.name != "token_embd.weight"
    }
    entries = {
        name: Entry(rng.lognormal(size=(1, columns)).astype(np.float32), np.ones(1, np.int64))
        for name, columns in names.items()
    }
    write_imatrix(ImportanceMatrix(entries, ("random",), 1), path)


def compare(llama_quantize: str, source: Path, preset: str, workers: int, rounds: int, imatrix: Path | None) -> str:
    """One line of the table."""
    ours_path, theirs_path = source.with_name("ours.gguf"), source.with_name("theirs.gguf")
    program = shutil.which("gguforge", path=str(Path(sys.executable).parent)) or "gguforge"
    ours_words = [program, "quantize", str(source), "--type", preset, "-o", str(ours_path)]
    ours_words += ["--workers", str(workers), "--overwrite", "--quiet"]
    guide = [] if imatrix is None else ["--imatrix", str(imatrix)]
    ours_words += guide
    theirs_words = [llama_quantize, *guide, str(source), str(theirs_path), preset, str(workers)]
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(run(theirs_words))
        ours.append(run(ours_words))
        if not filecmp.cmp(ours_path, theirs_path, shallow=False):
            raise SystemExit(f"{preset}: the files differ")
    wall = statistics.median(t.wall / o.wall for t, o in zip(theirs, ours, strict=True))
    cpu = statistics.median(t.cpu / o.cpu for t, o in zip(theirs, ours, strict=True))
    seconds = [
        f"{statistics.median(r.wall for r in runs):.2f} / {statistics.median(r.cpu for r in runs):.2f}"
        for runs in (theirs, ours)
    ]
    memory = max(o.memory for o in ours) / 2**20
    cells = [preset, str(workers), *seconds, f"{wall:.2f}x", f"{cpu:.2f}x", f"{memory:.0f} MiB"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--presets", default="Q4_K_M,Q6_K")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--imatrix", action="store_true", help="with a (random) importance matrix")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model-bf16.gguf"
        maker = multiprocessing.Process(target=make_model, args=(source, given.layers, 1280, 3584, 16384))
        maker.start()  # apart: the peak memory of children starts from that of the process that starts them
        maker.join()
        imatrix = Path(folder) / "imatrix.gguf" if given.imatrix else None
        if imatrix is not None:
            make_imatrix(source, imatrix)
        print(f"Input: {source.stat().st_size / 1e6:.0f} MB of BF16; {given.rounds} rounds by turns.\n")
        print("| preset | threads | llama-quantize wall / CPU s | gguforge wall / CPU s | speed | CPU | our memory |")
        print("|---|---|---|---|---|---|---|")
        for preset in given.presets.split(","):
            for workers in given.workers.split(","):
                print(compare(given.llama_quantize, source, preset, int(workers), given.rounds, imatrix), flush=True)


if __name__ == "__main__":
    main()
