"""Speed and memory of `gguforge convert` beside llama.cpp's converter and plain `cp`, on a bf16 checkpoint made for it.

    python bench/convert_speed.py --reference path/to/llama.cpp/convert_hf_to_gguf.py [--python PYTHON] [--gigabytes 3]

Linux only (memory is read from /proc). All take turns in one run, in another order each round. Ours ends with an
fsync, which `cp` and the reference leave out, hence the second line of `cp`. Memory is the peak of the whole process
tree, shared pages counted once (PSS), sampled every 20 ms. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN, VOCAB = 2048, 8192, 32000
LAYER_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * FFN + 2 * HIDDEN)
CHECKPOINTS = Path(__file__).parents[1] / "tests" / "convert" / "checkpoints.py"


@dataclass(frozen=True)
class Run:
    """What one conversion took: seconds of wall and processor time, peak bytes of memory."""

    wall: float
    cpu: float
    memory: int


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A Llama of random weights with as many layers as fill the size, in shards of about a gigabyte."""
    helpers = runpy.run_path(str(CHECKPOINTS))
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    config = helpers["like"](
        helpers["LLAMA"], vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    case = helpers["Case"](config)
    files = {"config.json": json.dumps(config).encode(), "tokenizer.model": helpers["sentencepiece_model"]()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    shapes = list(helpers["shapes"](case).items())
    shards = max(1, round(gigabytes))
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(shapes[i::shards])
        write_shard(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """One shard of bfloat16 numbers around zero, tensor by tensor."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    random = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            numbers = random.standard_normal(int(np.prod(shape)), dtype=np.float32) * np.float32(0.02)
            file.write((numbers.view("<u4") >> 16).astype("<u2").tobytes())


def measure(command: list[str]) -> Run:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    _, errors = process.communicate()
    wall = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{errors}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak[0])


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keep the largest memory that the process and its descendants held at one time."""
    while process.poll() is None:
        peak[0] = max(peak[0], sum(map(shared_memory, family(process.pid))))
        time.sleep(0.02)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    members = [pid]
    for member in members:
        for task in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += map(int, task.read_text().split())
            except OSError:
                continue  # it ended meanwhile
    return members


def shared_memory(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Make the checkpoint, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="BF16", help="type that ours writes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "checkpoint", Path(scratch) / "out.gguf"
        folder.mkdir()
        make_checkpoint(folder, arguments.gigabytes)
        shards = [str(path) for path in sorted(folder.glob("*.safetensors"))]
        quoted = " ".join(shards)
        ours = [sys.executable, "-m", "gguforge.cli", "convert", str(folder), "--quiet"]
        commands = {
            f"gguforge convert --type {arguments.type}": [*ours, "--type", arguments.type, "-o", str(output)],
            "the same, --workers 1": [*ours, "--type", arguments.type, "--workers", "1", "-o", str(output)],
            "cp": ["sh", "-c", f"mkdir {output} && cp {quoted} {output}"],
            "cp and fsync": ["sh", "-c", f"mkdir {output} && cp {quoted} {output} && sync {output}/*"],
        }
        if arguments.reference:
            commands["convert_hf_to_gguf.py"] = [
                arguments.python, str(arguments.reference), str(folder), "--outtype", "bf16", "--outfile", str(output),
            ]  # fmt: skip
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        order = list(commands.items())
        for number in range(arguments.rounds):
            random.Random(number).shuffle(order)  # what ran before leaves its mark on the memory of a virtual machine
            for name, command in order:
                os.sync()
                runs[name].append(measure(command))
                subprocess.run(["rm", "-rf", str(output)], check=True)
        total = sum(Path(shard).stat().st_size for shard in shards)
    head = f"{total / 1e9:.2f} GB of bf16 in {len(shards)} shards, median of {arguments.rounds} rounds"
    print(f"{head}, {os.cpu_count()} cores\n")
    print_table(runs)


def print_table(runs: dict[str, list[Run]]) -> None:
    """Medians, and ratios to the first row."""
    medians = {
        name: [statistics.median(getattr(run, field) for run in taken) for field in ("wall", "cpu", "memory")]
        for name, taken in runs.items()
    }
    first = next(iter(medians.values()))
    print("| | wall s | CPU s | peak MB | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|")
    for name, (wall, cpu, memory) in medians.items():
        ratios = f"{wall / first[0]:.2f} | {cpu / first[1]:.2f}"
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {memory / 1e6:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
