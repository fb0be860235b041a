"""Folders: what is missing, what disagrees, and what lies where it must not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoints import LLAMA, Case, build

from gguforge.convert.checkpoint import read_checkpoint
from gguforge.quant.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return build(Case(LLAMA), tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return build(Case(LLAMA, shards=3), tmp_path)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def change_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if value is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_order_is_by_shard_then_name(sharded: Path) -> None:
    tensors = list(read_checkpoint(sharded).tensors.values())
    assert tensors == sorted(tensors, key=lambda tensor: (tensor.path, tensor.name))
    assert len({tensor.path for tensor in tensors}) == 3


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder")


def test_a_file_is_no_folder(single: Path) -> None:
    refused(single / "config.json", "not a folder")


def test_no_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, "config.json is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000])
def test_damaged_config(single: Path, text: str | bytes) -> None:
    (single / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(single, "config.json")


def test_huge_config_is_not_read(single: Path) -> None:
    with (single / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    refused(single, "too large")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "no model")


def test_pickled_weights_are_refused_with_the_remedy(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "pickled.*safe_serialization")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "model-00002-of-00003.safetensors is missing")


def test_missing_shard_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert len(read_checkpoint(sharded).tensors) == 21
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refused(sharded, "model-00003-of-00003.safetensors is missing")


def test_index_names_a_tensor_that_is_nowhere(sharded: Path) -> None:
    change_index(sharded, **{"model.extra": "model-00001-of-00003.safetensors"})
    refused(sharded, "not in its shard")


def test_shard_holds_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    change_index(sharded, **{"model.norm.weight": None})
    refused(sharded, "index and shards disagree")


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(name for name in index.values() if name != index["model.norm.weight"])
    change_index(sharded, **{"model.norm.weight": other})
    refused(sharded, "index and shards disagree")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / "model-extra.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    refused(sharded, "in two shards")


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".hidden.safetensors",
        "x.bin",
        "model\n.safetensors",
        7,
        None,
    ],
)
def test_shard_names_are_no_paths(sharded: Path, name: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "shard name is not allowed")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_map(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "weight_map is missing")


needs_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


@needs_links
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(single: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (single / name).rename(elsewhere)
    (single / name).symlink_to(elsewhere)
    refused(single, "outside the checkpoint folder")


@needs_links
def test_a_link_within_the_folder_is_followed(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights")
    (single / "model.safetensors").symlink_to("weights")
    assert len(read_checkpoint(single).tensors) == 21


@needs_links
def test_snapshots_of_the_hub_cache_link_to_their_blobs(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--Model-7B"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(single.iterdir())):
        path.rename(repository / "blobs" / f"{i:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040}")
    checkpoint = read_checkpoint(snapshot)
    assert checkpoint.name == "owner/Model-7B"
    assert len(checkpoint.tensors) == 21


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_in_place_of_a_shard_does_not_block(single: Path) -> None:
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    refused(single, "not a regular file")
