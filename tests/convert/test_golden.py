"""Every case of the checkpoint files against what llama.cpp's converter wrote: golden.json, by make_goldens.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_checkpoints
import learned_checkpoints
import pytest
from checkpoints import CASES as LLAMA_LIKE
from checkpoints import build
from manifest import manifest

from gguforge.convert import convert

CASES = LLAMA_LIKE | learned_checkpoints.CASES | encoder_checkpoints.CASES
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text("utf-8"))

DIFFERENT = {
    "llama-byte-fallback": {
        "tokenizer.ggml.scores"
    },  # ours are merge ranks; the converter writes -1000 for every token
    "xlm-roberta-json": {
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.remove_extra_whitespaces",
    },  # ours are what the tokenizer does; the converter writes defaults of transformers' that it does not heed
}
"""Metadata whose value differs on purpose; see docs/convert.md."""


@pytest.mark.parametrize("name", CASES)
def test_equals_llama_cpp_converter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    output = tmp_path / "out.gguf"
    convert(build(case, tmp_path), output, type=case.type, workers=1, warn=lambda line: None)
    ours, theirs = manifest(output), GOLDEN[name]
    different = DIFFERENT.get(name, set())
    assert {k: v for k, v in ours["metadata"].items() if k not in different} == {
        k: v for k, v in theirs["metadata"].items() if k not in different
    }
    assert ours["tensors"] == theirs["tensors"]
    assert ours["order"] == theirs["order"]
    if not different:
        assert ours["file"] == theirs["file"]
