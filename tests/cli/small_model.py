"""The tiny model of tests/runtime with weights that do something, and a text to read through it."""

from __future__ import annotations

from pathlib import Path

from tiny_model import write_tiny_model


def write_model_and_text(folder: Path) -> Path:
    """Writes model.gguf and text.txt, about 1900 tokens."""
    write_tiny_model(folder / "model.gguf", random=True)
    (folder / "text.txt").write_text("".join(f"{i} hello user, a list. " for i in range(99)), encoding="utf-8")
    return folder
