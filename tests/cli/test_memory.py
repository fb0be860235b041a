"""Memory stays flat: models larger than what a process may have are quantized and converted all the same.

The limit is RLIMIT_DATA: the kernel refuses a process more anonymous memory (heap, private writable maps) than that. It
does not count files that are mapped for reading, so the resident memory is watched too.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
from checkpoints import LLAMA, Case, build, shapes
from running import COMMAND, linux, peak_memory

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.metadata import uint32
from gguforge.quant.plan import TensorPlan
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import FileSource

MIB = 1 << 20
LIMIT = 300 * MIB  # anonymous memory of each process
GOAL = 150 * MIB  # resident memory of both processes together, mapped files included
QUICK, LARGE = 400 * MIB, 3 << 30  # bytes of weights, all of them a hole in the file

sizes = pytest.mark.parametrize("nbytes", [QUICK, pytest.param(LARGE, marks=pytest.mark.slow)])


def limited(*words: object) -> subprocess.Popen[str]:
    """The command under the limit, with two workers."""
    import resource

    return subprocess.Popen(
        [*COMMAND, *map(str, words), "--workers", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )


def model_of_zeros(folder: Path, nbytes: int) -> Path:
    """A GGUF file with `nbytes` of F16 weights in layers of 32 MiB, none of which takes space on the disk."""
    plan = models.build(folder, T.F16, layers=1)
    shape = (4096, 4096)
    layers = nbytes // (2 * 4096 * 4096)
    source = FileSource(str(folder / "weights.bin"), 0, shape, T.F16)
    tensors = tuple(TensorPlan(f"blk.{i}.ffn_up.weight", shape, T.F16, source) for i in range(layers))
    header = replace(plan, metadata=plan.metadata | {"llama.block_count": uint32(layers)}, tensors=tensors)
    path = folder / "zeros.gguf"
    path.write_bytes(header.header)
    os.truncate(path, header.size)
    return path


def checkpoint_of_zeros(folder: Path, nbytes: int) -> Path:
    """A Llama checkpoint with about `nbytes` of BF16 weights, none of which takes space on the disk."""
    config = LLAMA | {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
    layers = nbytes // (2 * 2048 * (2 * 2048 + 2 * 256 + 3 * 6144))
    case = Case(config | {"num_hidden_layers": layers, "num_key_value_heads": 2})
    path = build(Case(LLAMA), folder)
    (path / "config.json").write_text(json.dumps(case.config))
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes(case).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path / "model.safetensors", 8 + len(text) + offset)
    return path


@linux
def test_the_limit_binds(tmp_path: Path) -> None:
    """A program that takes what it should not is refused under this limit."""
    import resource

    done = subprocess.run(
        [sys.executable, "-c", f"import numpy; numpy.ones({LIMIT}, 'u1')"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


@linux
@sizes
@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_quantize(type: str, nbytes: int, tmp_path: Path) -> None:
    source, out = model_of_zeros(tmp_path, nbytes), tmp_path / "out.gguf"
    with limited("quantize", source, "-t", type, "-o", out) as process:
        peak = peak_memory(process)
        assert process.returncode == 0, process.communicate()
    assert peak < GOAL
    assert read_gguf(out).size > nbytes // 4
    out.unlink()


@linux
@sizes
@pytest.mark.parametrize("type", ["BF16", "Q8_0"])
def test_convert(type: str, nbytes: int, tmp_path: Path) -> None:
    source, out = checkpoint_of_zeros(tmp_path, nbytes), tmp_path / "out.gguf"
    with limited("convert", source, "-t", type, "-o", out) as process:
        peak = peak_memory(process)
        assert process.returncode == 0, process.communicate()
    assert peak < GOAL
    assert read_gguf(out).size > nbytes // 3
    out.unlink()
