"""Reads `lessons.txt`, the demo model's whole education, and writes out its patterns as plain questions.

The file's own head explains its notation. This module knows nothing of tokens or training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from gguforge.quant.errors import InputError

LESSONS = Path(__file__).with_name("lessons.txt")

ABOUT = (
    "what is {}",
    "what's {}",
    "what exactly is {}",
    "explain {}",
    "explain {} to me",
    "explain what {} means",
    "tell me about {}",
    "what does {} mean",
    "what do you know about {}",
    "what is meant by {}",
    "define {}",
    "describe {}",
    "{}",
    "and what is {}",
    "what about {}",
    "can you explain {}",
    "can you tell me about {}",
    "give me a definition of {}",
    "what do people mean by {}",
    "I want to understand {}",
    "I don't understand {}",
    "how would you explain {}",
    "what is {} in simple words",
    "teach me about {}",
    "I have never heard of {}",
    "what can you say about {}",
    "in a few words, what is {}",
)
"""The usual words for asking what something is."""

COMPARE = (
    "what is the difference between {} and {}",
    "how does {} differ from {}",
    "how do {} and {} differ",
    "{} or {}",
    "{} versus {}",
    "{} vs {}",
    "is {} better than {}",
    "is {} the same as {}",
    "how does {} compare to {}",
    "should I take {} or {}",
    "{} compared with {}",
    "compare {} and {}",
    "which is better, {} or {}",
    "what distinguishes {} from {}",
    "are {} and {} the same",
)
"""The usual words for comparing two things, in either order."""

MANY = 400
"""A pattern with more readings than this is sampled, not written out."""

Lists = dict[str, list[str]]


@dataclass
class Lesson:
    """One topic: patterns of questions, questions kept for measuring, answers, and what to say when asked for more.

    `own` are the patterns written for this topic alone; the others are the usual words with its subjects put in.
    """

    topic: str
    patterns: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Dialogue:
    """Questions that belong together; the last one is answered by `answer`, the others by their own lessons."""

    questions: tuple[str, ...]
    answer: str


@dataclass
class Course:
    """Everything in the file."""

    lists: Lists = field(default_factory=dict)
    lessons: list[Lesson] = field(default_factory=list)
    dialogues: list[Dialogue] = field(default_factory=list)

    def lesson(self, topic: str) -> Lesson:
        return next(lesson for lesson in self.lessons if lesson.topic == topic)


def read_course(path: Path = LESSONS) -> Course:
    """Parse the lessons.

    Raises:
        InputError: a line that the notation does not know, with its number.
    """
    course = Course()
    lesson = Lesson("")
    questions: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark, text = line[:1], line[1:].strip()
        match mark:
            case "" | "#":
                pass
            case "@":
                name, _, words = text.partition("=")
                course.lists[name.strip()] = split_choice(words)
            case "[":
                lesson = Lesson(text.removesuffix("]"))
                if lesson.topic != "dialogue":
                    course.lessons.append(lesson)
            case "*":
                lesson.patterns += [form.format(subject) for subject in split_choice(text) for form in ABOUT]
            case "=":
                one, two = split_choice(text)
                lesson.patterns += [form.format(*pair) for form in COMPARE for pair in ((one, two), (two, one))]
            case "?":
                lesson.patterns.append(text)
                lesson.own.append(text)
            case "~":
                lesson.held_out.append(text)
            case "!":
                lesson.answers.append(text)
            case "+":
                lesson.more.append(text)
            case ">":
                questions = tuple(split_choice(text))
            case "<":
                course.dialogues.append(Dialogue(questions, text))
            case _:
                raise InputError("line is not understood", path=f"{path}:{number}", found=repr(line))
    return course


def split_choice(text: str) -> list[str]:
    """The alternatives in 'one | two'.

    >>> split_choice(" Q4_K | a k-quant")
    ['Q4_K', 'a k-quant']
    """
    return [part.strip() for part in text.split("|")]


def _choices(pattern: str, lists: Lists) -> list[list[str]]:
    """The pattern cut into parts, each with its alternatives.

    >>> _choices("tell (me|us) [all]", {})
    [['tell '], ['me', 'us'], [' '], ['all', '']]
    """
    parts = re.split(r"(\([^)]*\)|\[[^\]]*\]|<\w+>)", pattern)
    result = []
    for part in filter(None, parts):
        match part[0]:
            case "(":
                inner = [alternative.strip() for alternative in part[1:-1].split("|")]
                result.append([reading for alternative in inner for reading in readings(alternative, lists)])
            case "[":
                result.append([*(alternative.strip() for alternative in part[1:-1].split("|")), ""])
            case "<":
                result.append(lists[part[1:-1]])
            case _:
                result.append([part])
    return result


def readings(pattern: str, lists: Lists) -> Iterator[str]:
    """Every question that a pattern stands for.

    >>> list(readings("how (do|can) I <verb> [it]", {"verb": ["run"]}))
    ['how do I run it', 'how do I run', 'how can I run it', 'how can I run']
    """
    for words in product(*_choices(pattern, lists)):
        yield re.sub(r" +", " ", "".join(words)).strip()


def questions(patterns: Iterable[str], lists: Lists) -> list[str]:
    """What patterns stand for, without doubles and in their order; of a huge pattern, a fixed random sample."""
    found: dict[str, None] = {}
    for pattern in patterns:
        choices = _choices(pattern, lists)
        total = 1
        for alternatives in choices:
            total *= len(alternatives)
        if total <= MANY:
            found.update(dict.fromkeys(readings(pattern, lists)))
        else:
            chance = random.Random(pattern)
            found.update((re.sub(r" +", " ", "".join(map(chance.choice, choices))).strip(), None) for _ in range(MANY))
    return list(found)
