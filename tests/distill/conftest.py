"""A tiny teacher, written once a run, and a text for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TEXT = "".join(f"{i} hello user, a list of files. The model says: ask us.\n" for i in range(60))


def write_tiny_model(path: Path, **options: Any) -> Path:
    """See tests/runtime/tiny_model.py, which is not on this folder's path."""
    source = Path(__file__).parents[1] / "runtime" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model_for_distill", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.write_tiny_model(path, **options))


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
