"""Receipts and `gguforge verify`: the same work gives the same receipt, and no changed byte goes unseen."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from checkpoints import SMALL_K, Case, build, shapes, weights, write_shards
from checkpoints import encode as stored
from running import refused, run, run_here

from gguforge.quant.blocks import decode, encode
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import read_gguf
from gguforge.quant.relative_error import SAMPLE
from gguforge.quant.writer import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m-F16.gguf"
    write(models.build(path.parent, T.F16, layers=2), path, workers=1)
    return path


@pytest.fixture(scope="module")
def imatrix(model: Path) -> Path:
    """An importance matrix in which every column differs."""
    path = model.with_name("imatrix.gguf")
    entries = {
        tensor.name: Entry(np.arange(1, tensor.shape[-1] + 1, dtype=np.float32)[None], np.array([7]))
        for tensor in read_gguf(model).tensors
        if len(tensor.shape) == 2
    }
    write_imatrix(ImportanceMatrix(entries, ("text.txt",), 1), path)
    return path


@pytest.fixture(scope="module")
def quantized(model: Path, imatrix: Path) -> Path:
    path = model.with_name("m-Q4_K_M.gguf")
    done = run("quantize", model, "-t", "Q4_K_M", "-o", path, "--imatrix", imatrix)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged, with its receipt."""
    for path in (quantized, Path(f"{quantized}.json")):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / quantized.name


def receipt_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{path}.json").read_text())
    return found


def test_what_is_in_a_receipt(quantized: Path, model: Path, imatrix: Path) -> None:
    receipt, file, data = receipt_of(quantized), read_gguf(quantized), quantized.read_bytes()
    assert receipt["gguforge_receipt"] == 1
    assert receipt["command"] == "quantize"
    content = hashlib.sha256(imatrix.read_bytes()).hexdigest()
    assert receipt["settings"] == {"preset": "Q4_K_M", "imatrix": {"name": "imatrix.gguf", "sha256": content}}
    assert receipt["sources"].keys() == {"m-F16.gguf"}
    assert receipt["sources"]["m-F16.gguf"]["bytes"] == model.stat().st_size
    assert receipt["bytes"] == len(data)
    assert receipt["header_sha256"] == hashlib.sha256(data[: file.data_offset]).hexdigest()
    digest = hashlib.sha256(bytes.fromhex(receipt["header_sha256"]))
    for tensor, told in zip(file.tensors, receipt["tensors"], strict=True):
        assert (told["name"], told["type"], tuple(told["shape"])) == (tensor.name, tensor.type.name, tensor.shape)
        assert told["sha256"] == hashlib.sha256(data[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest()
        assert (told["importance"] is not None) == (len(tensor.shape) == 2)
        digest.update(bytes.fromhex(told["sha256"]))
    assert receipt["digest"] == digest.hexdigest()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model so small that all rows are sampled, and what Q4_K_M makes of it."""
    path = tmp_path_factory.mktemp("narrow") / "m-F32.gguf"
    plan = models.build(path.parent, T.F32, layers=1)
    shape = (SAMPLE // 256, 256)
    tensors = [
        tensor if len(tensor.shape) == 1 else replace(tensor, shape=shape, source=replace(tensor.source, shape=shape))
        for tensor in plan.tensors
    ]
    write(replace(plan, tensors=tuple(tensors)), path, workers=1)
    out = path.with_name("m-Q4_K_M.gguf")
    assert run_here("quantize", path, "-t", "Q4_K_M", "-o", out).returncode == 0
    return path, out


def test_the_relative_error_of_all_rows(narrow: tuple[Path, Path]) -> None:
    source, out = narrow
    wanted = {}
    originals = {tensor.name: tensor for tensor in read_gguf(source).tensors}
    for new in read_gguf(out).tensors:
        old = originals.pop(new.name)
        x, y = (
            decode(np.fromfile(path, np.uint8, t.nbytes, offset=t.offset), t.type)
            for path, t in ((source, old), (out, new))
        )
        x = x.astype(np.float64)
        wanted[new.name] = float(f"{np.sqrt(((y - x) ** 2).mean() / (x**2).mean()):.4g}")
    assert {tensor["name"]: tensor["relative_error"] for tensor in receipt_of(out)["tensors"]} == wanted
    assert wanted["output_norm.weight"] == 0 < wanted["blk.0.attn_k.weight"] < 0.2
    shown = json.loads(run_here("inspect", out, "--json").stdout)["tensors"]
    assert {tensor["name"]: tensor["relative_error"] for tensor in shown} == wanted
    head, *lines = [line.split() for line in run_here("inspect", out, "--tensors").stdout.splitlines()]
    assert head[-1] == "error"
    assert {line[0]: float(line[-1]) for line in lines} == wanted


def test_another_relative_error_than_the_receipt_says(narrow: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = narrow
    words, receipt = ("verify", tmp_path / out.name, "--source", source, "--workers", 1), receipt_of(out)
    shutil.copy(out, tmp_path)
    for error, code in ((None, 0), (0.5, 1), ("much", 1)):
        tensor = next(tensor for tensor in receipt["tensors"] if tensor["name"] == "blk.0.attn_k.weight")
        tensor["relative_error"] = error
        if error is None:  # as in receipts of before there were any
            del tensor["relative_error"]
        (tmp_path / f"{out.name}.json").write_text(json.dumps(receipt))
        done = run_here(*words)
        assert done.returncode == code, done.stderr
        if error == 0.5:
            refused(done, "1 difference: blk.0.attn_k.weight has another relative error than the receipt says")
    assert "is no receipt" in done.stderr
    assert "error" in run_here("inspect", out, "--tensors").stdout
    assert "error" not in run_here("inspect", tmp_path / out.name, "--tensors").stdout


def test_the_same_work_gives_the_same_receipt(quantized: Path, model: Path, imatrix: Path, tmp_path: Path) -> None:
    for path in (model, imatrix):
        shutil.copy(path, tmp_path / path.name)
    words = ("quantize", tmp_path / model.name, "-t", "Q4_K_M", "-o", "other.gguf", "--workers", 1)
    done = run(*words, "--imatrix", tmp_path / imatrix.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, theirs = receipt_of(tmp_path / "other.gguf"), receipt_of(quantized)
    assert mine["tensors"] == theirs["tensors"]
    # llama-quantize's metadata hold the matrix's path as it was given, so the headers differ, and all else is equal
    assert {key for key in mine if mine[key] != theirs[key]} == {"bytes", "header_sha256", "digest"} - (
        {"bytes"} if mine["bytes"] == theirs["bytes"] else set()
    )
    assert str(tmp_path) not in Path(f"{tmp_path}/other.gguf.json").read_text()


def test_a_sound_file(quantized: Path, model: Path, imatrix: Path) -> None:
    done = run("verify", quantized)
    digest = receipt_of(quantized)["digest"]
    assert done.stdout == f"{quantized}: receipt: 21 tensors agree, digest {digest}\n"
    assert f"receipt by gguforge 0.1.0, digest {digest}" in run("inspect", quantized).stdout
    assert json.loads(run("inspect", quantized, "--json").stdout)["receipt_digest"] == digest
    done = run("verify", quantized, "--source", model, "--imatrix", imatrix, "--all", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["differences"], result["compared_tensors"]) == (0, [], 21)
    assert result["digests"] == [digest]


@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_one_flipped_bit(place: str, copy: Path) -> None:
    file, data = read_gguf(copy), bytearray(copy.read_bytes())
    name = bytes(data).index(b"tiny")
    tensors = sorted(file.tensors, key=lambda tensor: tensor.offset)
    where = {"header": name, "first": tensors[0].offset, "last": tensors[-1].offset + tensors[-1].nbytes - 1}[place]
    data[where] ^= 1
    copy.write_bytes(data)
    what = {"header": "has another header", "first": tensors[0].name, "last": f"{tensors[-1].name} has other bytes"}
    refused(run("verify", copy), f"m-Q4_K_M.gguf: 1 difference: {what[place]}")


@pytest.mark.parametrize("words", [(), ("--all",)])
def test_a_file_of_another_source(words: tuple[str, ...], quantized: Path, imatrix: Path, tmp_path: Path) -> None:
    plan = models.build(tmp_path, T.F16, layers=2)
    weights = np.fromfile(tmp_path / "weights.bin", "<u2")
    weights ^= 1
    weights.tofile(tmp_path / "weights.bin")
    write(plan, tmp_path / "other-F16.gguf", workers=1)
    done = run("verify", quantized, "--source", tmp_path / "other-F16.gguf", "--imatrix", imatrix, *words)
    assert done.returncode == 1
    assert "has other bytes than the source gives" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_is_changed_anywhere_is_found_with_all(copy: Path, model: Path, imatrix: Path) -> None:
    """A file and its receipt that were both forged do not agree with the source."""
    tensor = next(t for t in read_gguf(copy).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(copy.read_bytes())
    data[tensor.offset + tensor.nbytes - 1] ^= 1
    copy.write_bytes(data)
    Path(f"{copy}.json").unlink()
    done = run("verify", copy, "--source", model, "--imatrix", imatrix, "--all")
    refused(done, "1 difference: blk.1.ffn_down.weight has other bytes than the source gives")


def test_the_importance_matrix_is_asked_for(quantized: Path, model: Path) -> None:
    refused(run("verify", quantized, "--source", model), "Give it with --imatrix.")


def test_a_checkpoint_as_source(tmp_path: Path) -> None:
    folder = build(Case(SMALL_K), tmp_path)
    out = tmp_path / "m.gguf"
    assert run("convert", folder, "-t", "Q4_K_M", "-o", out).returncode == 0
    assert receipt_of(out)["sources"].keys() == {"model.safetensors"}
    done = run("verify", out, "--source", folder, "--all")
    assert "tensors agree (every row)" in done.stdout, done.stderr


def test_a_split_model(model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-t", "Q8_0", "-o", tmp_path / "m.gguf", "--split-max-tensors", 8)
    assert run(*words).returncode == 0
    first = tmp_path / "m-00001-of-00003.gguf"
    done = run("verify", first, "--source", model, "--json")
    assert json.loads(done.stdout)["differences"] == []
    assert len(json.loads(done.stdout)["digests"]) == 3


@pytest.mark.parametrize("words", [(), ("--prune-layers", "0")])
def test_a_model_without_some_layers(words: tuple[str, ...], model: Path, imatrix: Path, tmp_path: Path) -> None:
    """What was pruned stands in the receipt, or is told."""
    out = tmp_path / "m.gguf"
    made = run("quantize", model, "-t", "Q4_K_M", "--prune-layers", "0", "--imatrix", imatrix, "-o", out)
    assert made.returncode == 0, made.stderr
    if words:
        Path(f"{out}.json").unlink()
    check = ("verify", out, "--source", model, "--imatrix", imatrix, "--all")
    done = run(*check, *words)
    assert "12 tensors agree (every row)" in done.stdout, done.stderr
    refused(run(*check, "--prune-layers", "1"), "has other bytes than the source gives")


def test_weights_on_a_grid(model: Path, tmp_path: Path) -> None:
    """A Q3_K model in floats: llama.cpp's encoder would find other blocks."""
    coarse, floats, out = (tmp_path / name for name in ("q.gguf", "f-F16.gguf", "m.gguf"))
    assert run("quantize", model, "-t", "Q3_K_S", "--pure", "-o", coarse).returncode == 0
    plan = plan_of_file(read_gguf(coarse))
    tensors = tuple(tensor if tensor.type == T.F32 else replace(tensor, type=T.F16) for tensor in plan.tensors)
    write(replace(plan, tensors=tensors), floats, workers=1)
    done = run("quantize", floats, "-t", "Q3_K_S", "--pure", "-o", out)
    assert "seem to lie on the grid of Q3_K already: --quality lossless keeps them exactly" in done.stderr
    done = run("quantize", floats, "-t", "Q4_K_M", "--quality", "lossless", "-o", out, "--overwrite", "--explain")
    assert "lossless: the weights lie on the grid of Q3_K" in done.stdout
    assert "written without loss, being on a quantization grid already: 16 as Q3_K" in done.stderr
    found, wanted = ({t.name: t for t in read_gguf(path).tensors} for path in (out, coarse))
    for name, tensor in wanted.items():
        assert found[name].type == tensor.type
    rules = [tensor["rule"] for tensor in receipt_of(out)["tensors"]]
    assert sum(rule.startswith("lossless") for rule in rules) == 16
    assert run("verify", out, "--source", floats, "--all").returncode == 0
    data = bytearray(out.read_bytes())
    place = found["blk.1.ffn_down.weight"]
    data[place.offset] ^= 1
    out.write_bytes(data)
    Path(f"{out}.json").unlink()
    refused(run("verify", out, "--source", floats, "--all"), "blk.1.ffn_down.weight has other bytes")


def test_a_checkpoint_on_a_grid(tmp_path: Path) -> None:
    """As training on the blocks of Q4_0 leaves it; rows of queries and keys are permuted on the way."""
    case, tensors = Case(SMALL_K), {}
    folder, out = build(case, tmp_path), tmp_path / "m.gguf"
    for name, shape in shapes(case).items():
        numbers = np.frombuffer(weights(name, shape, "F32")[2], "<f4").reshape(shape)
        if len(shape) == 2:
            numbers = decode(encode(decode(encode(numbers, T.Q4_0), T.Q4_0), T.BF16), T.BF16)
        tensors[name] = ("BF16", shape, stored(numbers, "BF16"))
    write_shards(folder, tensors, 1)
    done = run("convert", folder, "-t", "Q4_0", "-o", out)
    assert "seem to lie on the grid of Q4_0 already" in done.stderr
    refused(run("verify", out, "--source", folder, "--all", "--prune-layers", "99"), "has no layer 99")
    done = run("convert", folder, "-t", "Q4_0", "--quality", "lossless", "-o", out, "--overwrite")
    assert "being on a quantization grid already" in done.stderr
    matrices = sum(len(shape) == 2 for shape in shapes(case).values())
    receipt = receipt_of(out)
    assert sum(tensor["rule"].startswith("lossless") for tensor in receipt["tensors"]) == matrices
    assert {tensor["relative_error"] for tensor in receipt["tensors"]} == {0}
    assert receipt["sources"].keys() == {"model.safetensors"}
    assert run("verify", out, "--source", folder, "--all").returncode == 0


def test_other_rules_than_those_of_llama_cpp(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert run_here("quantize", model, "-t", "Q4_K_M", "--rules", "modern", "-o", out, "--workers", 1).returncode == 0
    assert run("verify", out, "--source", model, "--all").returncode == 0


def test_without_a_receipt(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert run("quantize", model, "-t", "Q8_0", "-o", out).returncode == 0
    assert run("quantize", model, "-t", "Q4_0", "-o", out, "--overwrite", "--no-receipt").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    refused(run("verify", out), "no receipt. Compare with the --source instead.")
    assert run("verify", out, "--source", model).returncode == 0
    refused(run("verify", out, "--all"), "--all, --imatrix and --prune-layers need --source", code=2)


@pytest.mark.parametrize("text", ["precious", "{}", "[1]", '{"gguforge_receipt": 1, "tensors": [{}]}', "[" * 100_000])
def test_a_file_that_is_no_receipt(text: str, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.gguf.json"
    other.write_text(text)
    words = ("quantize", model, "-t", "Q8_0", "-o", tmp_path / "m.gguf", "--workers", 1)
    refused(run_here(*words), "is in the way: it is no receipt of ours")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.json"]
    assert run_here(*words, "--no-receipt").returncode == 0
    assert other.read_text() == text
    refused(run_here("verify", tmp_path / "m.gguf"), "is no receipt")
