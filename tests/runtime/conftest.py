"""Tiny models and a text, written once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from gguforge.runtime.engine import Engine


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "random.gguf", random=True)


@pytest.fixture(scope="session")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "endless.gguf", endless=True, context=131072)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} hello user, a list he said it in {i * i}.\n" for i in range(30)), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[Engine]:
    with Engine.open(tiny_path, threads=1) as engine:
        yield engine


@pytest.fixture
def randomized(random_path: Path) -> Iterator[Engine]:
    with Engine.open(random_path, threads=1) as engine:
        yield engine
