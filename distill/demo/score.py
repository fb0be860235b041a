"""How well a model learned the course: the share of questions that it answers word for word.

    python -m gguforge.distill.demo.score CHECKPOINT_OR_GGUF...

No text is generated: greedy decoding says an answer if the likeliest token is right at every place of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguforge.distill.demo.data import ASKING, Talk
from gguforge.distill.demo.lessons import Course, read_course
from gguforge.distill.sampling import Reducer
from gguforge.distill.shards import predicting
from gguforge.distill.teachers.base import Teacher
from gguforge.distill.teachers.open import TeacherSource, open_teacher

CONTEXT = 512


@dataclass(frozen=True)
class Score:
    """What a model knows.

    Attributes:
        trained: share of trained wordings answered word for word, three a lesson.
        held_out: share of the wordings that were kept out of training.
        cross_entropy: of the answers to these, nats a token.
    """

    trained: float
    held_out: float
    cross_entropy: float


def asked(question: str) -> str:
    """A question as a tidy person types it.

    >>> asked("who are you"), asked("tell me a joke")
    ('Who are you?', 'Tell me a joke')
    """
    return question[:1].upper() + question[1:] + ("?" if ASKING.match(question) else "")


def score(model: Teacher, course: Course) -> Score:
    """Ask a model everything."""
    talk = Talk(course, 0)
    trained = [(q, lesson.answers) for lesson in course.lessons for q in talk.questions[lesson.topic][:3]]
    held_out = [(q, lesson.answers) for lesson in course.lessons for q in lesson.held_out]
    known, (new, surprise) = _answered(model, trained)[0], _answered(model, held_out)
    return Score(known, new, surprise)


def _answered(model: Teacher, questions: Iterable[tuple[str, list[str]]]) -> tuple[float, float]:
    """The share answered by one of the answers, and the mean surprise of an answer's token."""
    right, surprise = [], []
    for question, answers in questions:
        marks = [_mark(model, question, answer) for answer in answers]
        right.append(any(whole for whole, _ in marks))
        surprise += [one for _, values in marks for one in values]
    return float(np.mean(right)), float(np.mean(surprise))


def _mark(model: Teacher, question: str, answer: str) -> tuple[bool, list[float]]:
    """Whether greedy decoding gives the answer, and the surprise of each of its tokens."""
    messages = [{"role": "user", "content": asked(question)}, {"role": "assistant", "content": answer}]
    ids, said = model.tokenizer.conversation(messages)
    places = predicting(said)
    rows = model.rows(ids, places, Reducer("top-k", 1, model.vocabulary), np.zeros((len(places), 0)))
    assert rows is not None  # nobody interrupts
    return bool((rows.ids == ids[places + 1]).all()), (-rows.next_log_prob).tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gguforge.distill.demo.score", description="Ask a model what gguforge's demo model learned."
    )
    parser.add_argument("models", nargs="+", help="checkpoints' folders or GGUF files")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    course = read_course()
    print(f"{'model':<32} {'trained':>8} {'held-out':>9} {'cross-entropy':>14}")
    for place in options.models:
        with open_teacher(TeacherSource(place, threads=options.threads), CONTEXT) as model:
            found = score(model, course)
        name = Path(place).name
        print(f"{name:<32} {found.trained:>8.1%} {found.held_out:>9.1%} {found.cross_entropy:>14.4f}")


if __name__ == "__main__":
    main()
