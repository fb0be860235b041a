"""The tiny model of tests/runtime with weights that do something, and a text to read through it."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def write_model_and_text(folder: Path) -> Path:
    """Writes model.gguf and text.txt, about 1900 tokens."""
    source = Path(__file__).parents[1] / "runtime" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model_for_commands", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_tiny_model(folder / "model.gguf", random=True)
    (folder / "text.txt").write_text("".join(f"{i} hello user, a list. " for i in range(99)), encoding="utf-8")
    return folder
