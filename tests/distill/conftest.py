"""A tiny teacher, written once a run, and a text for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

TEXT = "".join(f"{i} hello user, a list of files. The model says: ask us.\n" for i in range(60))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teachers") / "teacher.gguf", random=True)


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the same tokenizer, and sure of other things."""
    return write_tiny_model(tmp_path_factory.mktemp("teachers") / "other.gguf")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
