"""What a GGUF file holds, in a form small enough to commit: metadata with types, tensors with hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gguforge.quant.metadata import Value
from gguforge.quant.reader import read_gguf

LONG = 8
"""Arrays beyond this length are hashed."""


def manifest(path: Path) -> dict[str, Any]:
    """Metadata and tensors in file order, and the hash of the whole file."""
    data = path.read_bytes()
    file = read_gguf(path)
    tensors = {
        tensor.name: [tensor.type.name, list(tensor.shape), _hash(data[tensor.offset : tensor.offset + tensor.nbytes])]
        for tensor in file.tensors
    }
    order = _hash(json.dumps([list(file.metadata), list(tensors)]).encode())
    metadata = {key: _short(value) for key, value in file.metadata.items()}
    return {"metadata": metadata, "tensors": tensors, "order": order, "file": _hash(data)}


def _short(value: Value) -> list[Any]:
    if value.item is None:
        return [value.kind.name, value.value]
    assert isinstance(value.value, list)
    if len(value.value) <= LONG:
        return [value.item.name, value.value]
    return [value.item.name, len(value.value), _hash(value.pack())]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
