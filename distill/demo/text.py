"""Writes the course as text files, so that recipes read it as any user's data:

    python -m gguforge.distill.demo.text --output DIR

    train.jsonl       conversations: questions in trained wordings, typed as people type; some are long
    held-out.jsonl    every wording that was kept out of training, once

A seed gives the same text everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from gguforge.distill.demo.data import LONG, MOSTLY_ONE, Talk, Turn
from gguforge.distill.demo.lessons import Course, read_course
from gguforge.distill.demo.score import asked
from gguforge.quant.files import replacing

COUNT = 3200
ONE_LONG_IN = 32
OWN = 0.4  # share of questions in a topic's own wordings (see `Talk`)


def training(course: Course, seed: int, count: int) -> Iterator[list[Turn]]:
    """Conversations to learn from, one in `ONE_LONG_IN` of them long."""
    short, long = Talk(course, seed, MOSTLY_ONE, OWN), Talk(course, seed + 1, LONG, OWN)
    for number in range(count):
        yield (short if number % ONE_LONG_IN else long).conversation()


def held_out(course: Course) -> Iterator[list[Turn]]:
    """Every held-out wording with its answer."""
    for lesson in course.lessons:
        for question in lesson.held_out:
            yield [("user", asked(question)), ("assistant", lesson.answers[0])]


def write_conversations(path: Path, conversations: Iterable[list[Turn]]) -> None:
    """One a line: {"messages": [{"role": ..., "content": ...}, ...]}."""
    lines = (
        json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"
        for turns in conversations
    )
    data = "".join(lines).encode()
    with replacing(path, len(data), overwrite=True) as part:
        part.write_bytes(data)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gguforge.distill.demo.text", description="Write the demo model's course as conversations."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and held-out.jsonl")
    parser.add_argument("--count", type=int, default=COUNT, help="conversations to train on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    course = read_course()
    write_conversations(options.output / "train.jsonl", training(course, options.seed, options.count))
    write_conversations(options.output / "held-out.jsonl", held_out(course))


if __name__ == "__main__":
    main()
