"""`gguforge quantize` against llama.cpp's own llama-quantize: same input, same threads, same bytes out.

    python3 bench/quantize_speed.py --llama-quantize path/to/llama-quantize
    python3 bench/quantize_speed.py --llama-quantize ... --presets all --imatrix both --workers 1 --rounds 1

The second line times every preset without and with an importance matrix, in less than ten minutes on a quiet machine.

Makes random Llama models of BF16, smaller ones for presets that take longer, then runs both by turns, so that a change
of the machine's pace meets both; every pair of outputs is compared byte for byte. Prints a Markdown table of medians
over the rounds: wall time, CPU time, their ratios, peak resident memory of the largest process.
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

from gguforge.quant.blocks import REGISTRY
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguforge.quant.metadata import float32, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import PRESETS, Preset, find_preset
from gguforge.quant.quantize import plan_of_file, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds of wall and CPU time, bytes of peak resident memory."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Size:
    """Of a random model.

    Attributes:
        layers, vocabulary: as in a Llama.
        least: millions of weights a second that a preset encodes at least to be timed on it.
    """

    layers: int
    vocabulary: int
    least: float


SIZES = (Size(8, 16384, 150), Size(2, 4096, 7.5), Size(1, 2048, 0))
HIDDEN, FFN = 1280, 3584
PACE = {T.Q2_K: (20, 8), T.Q3_K: (90, 30), T.Q4_K: (20, 9), T.Q5_K: (20, 9), T.Q6_K: (40, 35), T.IQ4_NL: (6, 6),
        T.IQ4_XS: (6, 6), T.MXFP4: (100, 100), T.Q4_0: (500, 40), T.Q4_1: (500, 9), T.Q5_0: (500, 40),
        T.Q5_1: (500, 9)}  # fmt: skip
"""Millions of weights a second, roughly, without and with importance; other types that search make 2 to 8."""


def size_for(base: T, guided: bool) -> Size:
    """The model that a preset is timed on."""
    searching = REGISTRY[base].importance != "ignored"
    pace = PACE.get(base, (5, 5) if searching else (500, 500))[guided]
    return next(size for size in SIZES if pace >= size.least)


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


def possible(preset: Preset, source: Path, imatrix: Path | None) -> bool:
    """Whether a preset can be made so, and differs from what is made otherwise."""
    if imatrix is not None:
        return REGISTRY[preset.base].importance != "ignored"
    try:
        retype(plan_of_file(read_gguf(source)), preset)
    except InputError:  # it needs an importance matrix
        return False
    return preset.name != "Q2_K_S"  # which llama-quantize refuses to make without


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
    guided = "yes" if imatrix else "no"
    cells = [
        preset,
        guided,
        str(workers),
        f"{source.stat().st_size / 1e6:.0f}",
        *seconds,
        f"{wall:.2f}x",
        f"{cpu:.2f}x",
        f"{memory:.0f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


class Models:
    """Random models in a folder, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, size: Size) -> tuple[Path, Path]:
        """The model of that size, and an importance matrix for it."""
        path = self.folder / f"{size.layers}-{size.vocabulary}" / "model.gguf"
        imatrix = path.with_name("imatrix.gguf")
        if not imatrix.exists():
            path.parent.mkdir()
            arguments = (path, size.layers, HIDDEN, FFN, size.vocabulary)
            maker = multiprocessing.Process(target=make_model, args=arguments)
            maker.start()  # apart: the peak memory of children starts from that of the process that starts them
            maker.join()
            make_imatrix(path, imatrix)
        return path, imatrix


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--presets", default="Q4_K_M,Q6_K", help="names, or all")
    parser.add_argument("--imatrix", choices=["no", "yes", "both"], default="no", help="a (random) importance matrix")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="of the model, whichever the preset: 24 make 0.9 GB")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled
    names = [name for name in PRESETS if name not in ("F32", "BF16")] if given.presets == "all" else None
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        print("| preset | imatrix | threads | input MB | llama-quantize wall / CPU s | gguforge wall / CPU s ", end="")
        print("| speed | CPU | our memory |\n|---|---|---|---|---|---|---|---|---|")
        for preset in map(find_preset, names or given.presets.split(",")):
            for guided in {"no": [False], "yes": [True], "both": [False, True]}[given.imatrix]:
                size = Size(given.layers, 16384, 0) if given.layers else size_for(preset.base, guided)
                source, imatrix = models.find(size)
                guide = imatrix if guided else None
                if not possible(preset, source, guide):
                    continue
                for workers in given.workers.split(","):
                    line = compare(given.llama_quantize, source, preset.name, int(workers), given.rounds, guide)
                    print(line, flush=True)


if __name__ == "__main__":
    main()
