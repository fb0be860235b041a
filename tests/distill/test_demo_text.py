"""The course as a user's data: every held-out wording is there, and none of them is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguforge.distill.demo.data import plain
from gguforge.distill.demo.lessons import read_course
from gguforge.distill.demo.text import main


def conversations(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_text_is_repeatable_and_keeps_held_out_wordings_out(tmp_path: Path) -> None:
    for name in ("one", "two"):
        main(["--output", str(tmp_path / name), "--count", "300"])
    one, two = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    trained, new = (conversations(tmp_path / "one" / f"{name}.jsonl") for name in ("train", "held-out"))
    assert len(trained) == 300
    assert max(map(len, trained)) >= 12
    course = read_course()
    wordings = {plain(question) for lesson in course.lessons for question in lesson.held_out}
    assert {plain(talk[0]["content"]) for talk in new} == wordings
    said = {plain(turn["content"]) for talk in trained for turn in talk if turn["role"] == "user"}
    assert not said & wordings
    assert all([turn["role"] for turn in talk if turn["role"] != "system"][::2][0] == "user" for talk in trained)
