"""How well `gguforge distill plan` foretells speed and memory, on models of random weights, against llama-bench.

    python3 bench/plan_speed.py --llama-bench path/to/llama-bench --threads 1

Fits the machine's speed as the command does, then writes students that had no part in the fit and compares, for each,
the forecast with what is measured here and with llama-bench's tg64 on the same file, run right after it; and the
forecast memory with that of a process that has the model open and its whole context filled: what is its own, and what
is resident with it (pages of the file that llama.cpp has repacked stay there until the memory is wanted).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from turns import run

from gguforge.distill.planning.cost import Budget
from gguforge.distill.planning.family import family_of
from gguforge.distill.planning.search import Limits, Planner, pace_here
from gguforge.distill.planning.shapes import new_shapes
from gguforge.runtime.pace import bytes_per_token, measure_decoding
from gguforge.runtime.stand_in import write_random

SIZES = (50e6, 150e6, 300e6)  # bytes of the students
OPEN = """
import sys
from gguforge.runtime.library import library, load_model, new_context
from pathlib import Path
import ctypes
path, context, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
llama, model = library(), load_model(path)
made = new_context(model, path, context=context, threads=threads)
for _ in range(context // 256):
    llama.llama_decode(made, llama.llama_batch_get_one((ctypes.c_int32 * 256)(*[1] * 256), 256))
status = dict(line.split(":") for line in open("/proc/self/status"))
print(*(int(status[name].split()[0]) // 1024 for name in ("RssAnon", "VmRSS")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    planner = Planner(family_of(None), Limits(2 * 10**9, context=512, preset=options.type), Budget())
    shapes = list(new_shapes(planner.family.shape))
    pace = pace_here(planner, shapes, options.threads, lambda line: None)
    print(f"fitted: {1e-9 / pace.line[1]:.2f} GB/s and {1000 * pace.line[0]:.2f} ms a token")
    print("| student | forecast tok/s | measured | llama-bench | forecast MiB | own | resident |\n" + 7 * "|---" + "|")
    for size in SIZES:
        fitting = [one for one in shapes if 0.62 * one.weights(planner.family.vocabulary) <= size]
        shape = min(fitting, key=planner.loss)
        plan = planner.plan(shape)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "student.gguf"
            write_random(plan, path)
            ours, theirs = [], []
            for _ in range(options.rounds):
                ours.append(1 / measure_decoding(path, options.threads))
                words = [
                    options.llama_bench,
                    "-m",
                    path,
                    "-p",
                    0,
                    "-n",
                    64,
                    "-t",
                    options.threads,
                    "-r",
                    1,
                    "-o",
                    "json",
                ]
                theirs.append(json.loads(run(words)[1].partition("[")[2].join("[ "))[0]["avg_ts"])
            own, resident = run([sys.executable, "-c", OPEN, path, 512, options.threads])[1].split()
        print(
            f"| {shape} | {pace.speed(bytes_per_token(plan)):.1f} | {statistics.median(ours):.1f} | "
            f"{statistics.median(theirs):.1f} | {planner.memory(shape) / 2**20:.0f} | {own} | {resident} |"
        )


if __name__ == "__main__":
    main()
