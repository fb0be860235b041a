"""Writes a Hugging Face checkpoint: config, weights in bfloat16, tokenizer, sampling defaults. NumPy only.

    python -m gguforge.distill.demo.checkpoint STUDENT --output DIR    # a recipe's student, as it ships

Safetensors in one line: header length (u64, little-endian), JSON header padded with spaces to a multiple of 8, data.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.demo.tokenizer import tokenizer_config

SAMPLING = {"do_sample": True, "temperature": 0.3, "top_k": 20, "top_p": 0.9}


def to_bfloat16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest, ties to even.

    >>> [hex(bits) for bits in to_bfloat16(np.float32([1, -2, 1.00390625]))]
    ['0x3f80', '0xc000', '0x3f80']
    """
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write float32 tensors as bfloat16, in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, place + 2 * tensor.size]}
        place += 2 * tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(to_bfloat16(np.ascontiguousarray(tensor, np.float32)).astype("<u2").tobytes())


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a file in bfloat16 or float32, as float32."""
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:start])
    del header["__metadata__"]
    found = {}
    for name, entry in header.items():
        stored = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            weights = (np.frombuffer(stored, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            weights = np.frombuffer(stored, "<f4").astype(np.float32)
        found[name] = weights.reshape(entry["shape"])
    return found


def write_checkpoint(
    folder: Path, config: dict[str, Any], tokenizer: bytes, tensors: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write the five files of a checkpoint into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    context = config["max_position_embeddings"]
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config(tokenizer, context)),
        ("generation_config.json", {**ends, **SAMPLING}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gguforge.distill.demo.checkpoint", description="Write a recipe's student as it ships."
    )
    parser.add_argument("student", type=Path, help="the checkpoint that the recipe left")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    options = parser.parse_args(arguments)
    from gguforge.distill.demo.model import Shape  # needs torch

    stored = json.loads((options.student / "config.json").read_text(encoding="utf-8"))
    stored = {**(stored.get("rope_parameters") or {}), **stored}  # where transformers 5 keeps rope_theta
    shape = Shape(**{one.name: stored[one.name] for one in fields(Shape)})
    tokenizer = (options.student / "tokenizer.model").read_bytes()
    write_checkpoint(options.output, shape.config(), tokenizer, read_safetensors(options.student / "model.safetensors"))


if __name__ == "__main__":
    main()
