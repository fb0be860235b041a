"""Rows of data sets as lines, with a stand-in for the package that fetches them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gguforge.distill.data import read_corpus
from gguforge.distill.hub import local_text
from gguforge.quant.errors import InputError, MissingExtraError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS: list[dict[str, Any]] = [
    {"messages": [{**message, "extra": 1} for message in TALK], "text": "not this"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"prompt": "hi", "completion": "hello"},
    {"instruction": "hi", "input": "", "output": "hello"},
]


def install(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets`; what it was asked for."""
    asked: list[tuple[Any, ...]] = []
    package = types.ModuleType("datasets")

    def load_dataset(name: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        if name == "no/such":
            raise ValueError("no such data set")
        return rows

    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


def test_rows_become_lines_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(monkeypatch, [*ROWS, {"text": "prose"}])
    names = ["hub:some/talks:train_sft:small", "other.txt", "hub:some/talks"]
    paths = local_text(names, tmp_path / "t")
    assert local_text(names, tmp_path / "t") == paths
    assert asked == [("some/talks", "small", "train_sft"), ("some/talks", None, "train")]
    assert [Path(path).name for path in paths] == [
        "some-talks-train_sft-small.jsonl",
        "other.txt",
        "some-talks-train.jsonl",
    ]
    lines = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()]
    assert lines == [{"messages": TALK}] * 4 + [{"text": "prose"}]
    assert read_corpus(paths[:1], 64, 1 << 18).conversations
    assert sorted(path.suffix for path in (tmp_path / "t").iterdir()) == [".jsonl", ".jsonl"]


@pytest.mark.parametrize("row", [{"label": 1}, {"conversations": [{"from": "tool", "value": "x"}]}, {"prompt": "x"}])
def test_rows_that_are_not_understood_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    install(monkeypatch, [*ROWS, row])
    with pytest.raises(InputError, match="row 4 is neither"):
        local_text(["hub:some/talks"], tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ROWS)
    with pytest.raises(InputError, match="cannot be fetched: no such data set"):
        local_text(["hub:no/such"], tmp_path)
    with pytest.raises(InputError, match="is no data set"):
        local_text(["hub:../etc"], tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"gguforge\[hub\]"):
        local_text(["hub:some/talks"], tmp_path)
