"""`gguforge inspect` as a user meets it: on sound, hostile, damaged and huge files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
from running import COMMAND, refused, run, run_here

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.metadata import Value, array, float32, string
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import FileSource
from gguforge.quant.writer import write

TEMPLATE = "{% for m in messages %}\n\t{{ m['content'] }} ✓\x1b[2J\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    plan = models.build(folder, T.F16, layers=2)
    metadata = plan.metadata | {
        "tokenizer.chat_template": string(TEMPLATE),
        "odd.floats": array(GGUFValueType.FLOAT32, [float("nan"), float("inf"), 0.5]),
        "odd.\x1b]0;title\x07key": string("first line\nsecond\r\x9b31m line \u202egnp.exe"),
        "odd.bytes": string("\udcff\udcfe"),
        "odd.empty": array(GGUFValueType.STRING, []),
    }
    tensors = [replace(t, name=t.name.replace("ffn_up", "\x1b[1Affn_up")) for t in plan.tensors]
    write(replace(plan, metadata=metadata, tensors=tuple(tensors)), folder / "m.gguf", workers=1)
    return folder / "m.gguf"


def test_summary(model: Path) -> None:
    done, file = run("inspect", model), read_gguf(model)
    weights = sum(tensor.elements for tensor in file.tensors)
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(" +", " ", done.stdout)
    for part in (
        f"{model}\n{file.size:,} bytes (",
        "GGUF version 3, alignment 32",
        f"{weights:,} weights in {len(file.tensors)} tensors, 16.0",
        "llama.block_count UINT32 2\n",
        "odd.floats FLOAT32[3] [nan, inf, 0.5]\n",
        "STRING[300] [<0>, <1>, <2>, <0x00>, <0x01>, <0x02>, ...]\n",
        "blk.0.attn_q.weight F16 256 x 256 131,072\n",
        f"sha256 {hashlib.sha256(TEMPLATE.encode()).hexdigest()}",
    ):
        assert part in text


@pytest.mark.parametrize("option", [[], ["--metadata"], ["--tensors"], ["--json"]])
def test_nothing_in_a_file_reaches_the_terminal_raw(option: list[str], model: Path) -> None:
    text = run("inspect", model, *option).stdout
    assert all(line.isprintable() for line in text.splitlines())
    assert text.isascii() or "\u202e" not in text
    if option != ["--json"]:
        assert ("\\x1b[1Affn_up" in text) == (option != ["--metadata"])
        assert ("\\x1b]0;title\\x07key" in text) == (option != ["--tensors"])


def test_metadata_alone_is_in_full(model: Path) -> None:
    lines = run("inspect", model, "--metadata").stdout.splitlines()
    assert len(lines) == 1 + len(read_gguf(model).metadata)
    tokens = next(line for line in lines if line.startswith("tokenizer.ggml.tokens "))
    assert tokens.endswith(", t298, t299]")


def test_tensors_alone(model: Path) -> None:
    lines = run("inspect", model, "--tensors").stdout.splitlines()
    assert lines[0].split() == ["name", "type", "shape", "bytes"]
    assert len(lines) == 1 + len(read_gguf(model).tensors)


def no_constants(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_json_is_json_and_complete(model: Path) -> None:
    found, file = json.loads(run("inspect", model, "--json").stdout, parse_constant=no_constants), read_gguf(model)
    assert found["bytes"] == file.size
    assert list(found["metadata"]) == list(file.metadata)
    assert found["metadata"]["odd.floats"] == {"type": "ARRAY", "item": "FLOAT32", "value": ["nan", "inf", 0.5]}
    assert found["metadata"]["odd.bytes"]["value"] == "\udcff\udcfe"
    assert found["metadata"]["llama.block_count"] == {"type": "UINT32", "value": 2}
    assert found["chat_template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert [(t["name"], tuple(t["shape"]), t["type"], t["offset"], t["bytes"]) for t in found["tensors"]] == [
        (t.name, t.shape, t.type.name, t.offset, t.nbytes) for t in file.tensors
    ]


@pytest.mark.parametrize("template", [TEMPLATE, "not UTF-8: \udcff", "", "ends with a line\n"])
def test_the_template_comes_byte_for_byte(template: str, tmp_path: Path) -> None:
    write(Plan({"tokenizer.chat_template": string(template)}, ()), tmp_path / "t.gguf", workers=1)
    printed = run("inspect", tmp_path / "t.gguf", "--template", encoding=None).stdout
    assert printed == template.encode("utf-8", "surrogateescape")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_the_template_cannot_move_the_cursor(model: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = run("inspect", model, "--template", stdout=theirs)
        shown = terminal.read(65536)
        os.close(theirs)
    assert done.returncode == 0
    assert b"\x1b" not in shown
    assert b"{{ m['content'] }} \xe2\x9c\x93\\x1b[2J\r\n{% endfor %}" in shown


def test_no_template(tmp_path: Path) -> None:
    write(Plan({}, ()), tmp_path / "empty.gguf", workers=1)
    refused(run("inspect", tmp_path / "empty.gguf", "--template"), "empty.gguf: no chat template inside")
    done = run("inspect", tmp_path / "empty.gguf")
    assert "0 weights in 0 tensors, 0.00 bits per weight" in done.stdout
    assert "No chat template" in done.stdout


@pytest.mark.parametrize("template", [float32(1.5), array(GGUFValueType.STRING, ["a", "b"])])
def test_a_template_of_another_type(template: Value, tmp_path: Path) -> None:
    write(Plan({"tokenizer.chat_template": template}, ()), tmp_path / "t.gguf", workers=1)
    for option in ([], ["--json"], ["--template"]):
        assert run("inspect", tmp_path / "t.gguf", *option).returncode == 0


HEADER = b"GGUF" + struct.pack("<I", 3)
DAMAGED = {
    "nothing": (b"", "this is not a GGUF file"),
    "text": (b"hello\x1b[2J", "this is not a GGUF file (expected the bytes 'GGUF' first, found b'hell')"),
    "counts": (HEADER + struct.pack("<QQ", 2**63, 2**63), "metadata count is more than the file can hold"),
    "name": (
        HEADER + struct.pack("<QQQ", 0, 2, 4) + b"\x1b[2J" + struct.pack("<II", 99, 0) + bytes(20),
        "the type of '\\x1b[2J' is unknown (found 99)",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_get_one_line(name: str, tmp_path: Path) -> None:
    data, message = DAMAGED[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    for option in ([], ["--json"]):
        refused(run_here("inspect", tmp_path / "bad.gguf", *option), f"bad.gguf: {message}")


def test_a_file_cut_in_the_middle(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    refused(run("inspect", tmp_path / "cut.gguf"), "download or make it again")


def test_what_is_no_file(tmp_path: Path) -> None:
    refused(run("inspect", tmp_path), "this is not a file. Give the path of a .gguf file.")
    refused(run("inspect", tmp_path / "no\nwhere"), "no such file or directory")
    if os.name == "posix":
        refused(run("inspect", "/dev/zero"), "this is not a file")


def test_a_huge_file_costs_nothing(tmp_path: Path) -> None:
    path, data = tmp_path / "huge.gguf", tmp_path / "data"
    source = FileSource(str(data), 0, (5, 1 << 30), T.I8)
    plan = Plan({"general.name": string("huge")}, (TensorPlan("t", (5, 1 << 30), T.I8, source),))
    path.write_bytes(plan.header)
    os.truncate(path, plan.size)  # 5 GiB of holes
    start = time.monotonic()
    done = run("inspect", path)
    assert time.monotonic() - start < 5
    assert "5,368,709,120 weights in 1 tensors, 8.00 bits per weight" in done.stdout


def test_one_long_key_does_not_widen_every_line(tmp_path: Path) -> None:
    value = Value(GGUFValueType.UINT8, 1)
    keys = ["k" * 65535, *(f"{i}" for i in range(3000))]
    write(Plan(dict.fromkeys(keys, value), ()), tmp_path / "wide.gguf", workers=1)
    assert len(run("inspect", tmp_path / "wide.gguf").stdout) < 1 << 20


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_has_left_is_no_reason_for_noise(model: Path) -> None:
    end, pipe = os.pipe()
    os.close(end)
    done = run("inspect", model, "--metadata", stdout=pipe)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_output_that_cannot_be_written(model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("inspect", model, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "error: no space left on device. Free some space or write to another disk.\n"


def test_a_terminal_of_few_letters(tmp_path: Path) -> None:
    write(Plan({"k": string("naïve 中文")}, ()), tmp_path / "m.gguf", workers=1)
    done = run("inspect", tmp_path / "m.gguf", env=os.environ | {"PYTHONIOENCODING": "cp1252"}, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert "naïve \\u4e2d\\u6587" in done.stdout


def test_the_command_is_the_installed_one() -> None:
    assert run("inspect", "--help").returncode == 0, COMMAND
