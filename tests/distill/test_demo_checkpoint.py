"""The checkpoint that ships inside: small, of the promised shape, and with its tokenizer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguforge.distill.demo
from gguforge.distill.demo.checkpoint import read_safetensors, to_bfloat16, write_checkpoint
from gguforge.distill.demo.tokenizer import CHAT_TEMPLATE, Tokenizer, train_tokenizer

SHIPPED = Path(gguforge.distill.demo.__file__).parents[1] / "demo_model"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file without its metadata, and where the data begins."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def test_shipped_checkpoint_is_whole_and_small() -> None:
    assert {path.name for path in SHIPPED.iterdir() if path.is_file()} == FILES
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 14_000_000


def test_shipped_tensors_are_bfloat16_in_rows_that_k_quants_divide() -> None:
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    header, start = read_header(SHIPPED / "model.safetensors")
    assert start % 8 == 0
    assert (
        start + max(entry["data_offsets"][1] for entry in header.values())
        == (SHIPPED / "model.safetensors").stat().st_size
    )
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        assert entry["shape"][-1] % 256 == 0, name
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert "lm_head.weight" not in header
    assert config["tie_word_embeddings"] is True
    assert len(header) == 2 + 9 * config["num_hidden_layers"]


def test_shipped_tokenizer_fits_the_model() -> None:
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer((SHIPPED / "tokenizer.model").read_bytes())
    assert tokenizer.processor.vocab_size() == config["vocab_size"]
    assert config["eos_token_id"] == tokenizer.end
    said = json.loads((SHIPPED / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert said["chat_template"] == CHAT_TEMPLATE
    assert said["add_bos_token"] is False
    sampling = json.loads((SHIPPED / "generation_config.json").read_text(encoding="utf-8"))
    assert 0 < sampling["temperature"] <= 0.5


def test_bfloat16_rounds_to_nearest_even() -> None:
    numbers = np.float32([0, 1, -1, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40])
    assert [hex(bits) for bits in to_bfloat16(numbers)] == [
        "0x0",
        "0x3f80",
        "0xbf80",
        "0x3f80",
        "0x3f82",
        "0x7f80",
        "0x1",
    ]


def test_written_checkpoint_reads_back(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([0.5])}
    config = {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 4}
    write_checkpoint(tmp_path / "new", config, train_tokenizer(["What is Q4_K?"] * 3, 275), tensors)
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    header, start = read_header(tmp_path / "new" / "model.safetensors")
    again = read_safetensors(tmp_path / "new" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in again.items()} == {k: v.tolist() for k, v in tensors.items()}
    data = (tmp_path / "new" / "model.safetensors").read_bytes()[start:]
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        bits = np.frombuffer(data[first:last], "<u2").astype(np.uint32) << 16
        assert bits.view(np.float32).reshape(header[name]["shape"]).tolist() == tensor.tolist()


def test_shipped_weights_are_finite_numbers() -> None:
    header, start = read_header(SHIPPED / "model.safetensors")
    bits = np.fromfile(SHIPPED / "model.safetensors", "<u2", offset=start)
    assert ((bits & 0x7F80) != 0x7F80).all()
    assert len(bits) == pytest.approx(sum(np.prod(entry["shape"]) for entry in header.values()), abs=0)
