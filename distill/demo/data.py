"""Turns lessons into training batches: questions asked in a thousand ways, conversations of one to four turns.

Everything is drawn from one seeded generator, so a seed gives the same batches on every machine.
No torch here: batches are NumPy arrays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.demo.lessons import Course, Lesson, questions
from gguforge.distill.demo.tokenizer import Tokenizer

Turn = tuple[str, str]  # role, content

ASKING = re.compile(r"(what|how|why|which|who|where|when|is|are|do|does|can|could|should|must|will|did|has)\b", re.I)
TELLING = re.compile(r"(explain|tell|describe|define|list|show|give|recommend|suggest|write)\b", re.I)
BEFORE_ASKING = (
    "please, ", "so ", "ok, ", "well, ", "hey, ", "hi, ", "hello, ", "um, ", "and ", "but ", "question: ", "tell me, ",
    "can you tell me ", "could you tell me ", "please tell me ", "I want to know ", "do you know ", "now ",
)  # fmt: skip
BEFORE_TELLING = (
    "please ",
    "can you ",
    "could you ",
    "would you ",
    "hey, ",
    "ok, ",
    "now ",
    "you should ",
    "I want you to ",
)
AFTER_ASKING = (" please", ", please", " exactly", " in short", " then", " again", " in gguforge", " for me", " really")
REWORDED = (
    (
        r"^how do I\b",
        ("how can I", "how to", "how would I", "how could I", "how should I", "what is the way to", "show me how to"),
    ),
    (r"^can I\b", ("could I", "may I", "is it possible to", "am I able to")),
    (r"^what is\b", ("what's", "whats", "explain what is", "what would be")),
    (r"^which\b", ("what",)),
    (r"^why\b", ("how come", "for what reason", "why exactly")),
    (r"^do I need\b", ("must I have", "is there a need for", "will I need", "do you need", "does it need")),
    (r"^tell me about\b", ("talk about", "say something about", "inform me about", "what can you tell me about")),
    (r"^explain\b", ("clarify", "could you explain", "please describe", "help me understand")),
    (r"\bgguforge\b", ("this tool", "the tool", "this program")),
)
"""Beginnings (and one name) that mean the same in other words."""
SYNONYMS = {
    "big": ("large", "huge"),
    "large": ("big",),
    "small": ("little", "tiny"),
    "fast": ("quick", "speedy"),
    "slow": ("sluggish",),
    "good": ("great", "useful", "fine"),
    "bad": ("poor", "terrible"),
    "best": ("right", "ideal", "optimal"),
    "use": ("choose", "take", "pick", "employ"),
    "choose": ("take", "pick", "select", "use"),
    "need": ("require", "want"),
    "required": ("needed", "necessary"),
    "make": ("create", "produce", "get", "build"),
    "show": ("display", "print", "give"),
    "list": ("show", "name", "enumerate"),
    "find": ("get", "see", "locate"),
    "happens": ("occurs", "is done"),
    "work": ("function", "operate"),
    "works": ("functions",),
    "mean": ("stand for", "say", "signify"),
    "means": ("is", "stands for"),
    "difference": ("distinction",),
    "smaller": ("more compact", "tinier"),
    "better": ("superior", "preferable"),
    "worse": ("inferior", "poorer"),
    "answer": ("reply", "response"),
    "question": ("message", "query"),
    "conversation": ("talk", "chat", "discussion"),
    "chat": ("conversation", "talk"),
    "computer": ("machine", "PC"),
    "laptop": ("notebook", "computer", "machine"),
    "model": ("network", "LLM", "language model"),
    "purpose": ("point", "goal", "use"),
    "leave": ("exit", "quit", "end"),
    "start": ("begin", "launch", "open"),
    "stop": ("end", "abort", "cancel", "halt"),
    "supported": ("possible", "available", "handled"),
    "support": ("handle", "know", "understand"),
    "contain": ("hold", "include", "store"),
    "stored": ("kept", "saved", "written"),
    "measure": ("test", "check", "determine"),
    "explain": ("describe", "clarify"),
    "used": ("needed", "employed"),
    "file": ("model file",),
    "command": ("subcommand",),
    "commands": ("subcommands",),
}
"""Words that may stand for one another in a question; not quite the same, but the answer stays."""
SMALL_WORDS = {"a", "an", "the", "of", "is", "are", "do", "does", "to", "in", "me", "i", "for", "it", "my", "and"}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the demo model of gguforge.",
    "Answer briefly.",
    "You are a friendly assistant that answers in short sentences.",
    "Be kind and short.",
)
NOTHING_MORE = "That is all I know about it. Ask me something else about gguforge, GGUF, quantization or distillation."
SHORT = ((1, 82), (2, 10), (3, 5), (4, 3))  # how many turns a conversation has, and how often
LONG = ((1, 30), (2, 10), (3, 10), (6, 15), (9, 15), (12, 20))
MIXED = ((1, 80), (2, 8), (3, 4), (6, 3), (9, 3), (12, 2))
MOSTLY_ONE = ((1, 95), (2, 3), (4, 1), (8, 1))
HASTE = 0.8  # share of the one-turn conversations that stop after the answer's first words
FIRST_WORDS = 8  # tokens: by then it is decided which answer is given, and the rest is soon known by heart


def ask(question: str, chance: random.Random) -> str:
    """One of the many ways in which people type a question: politely, carelessly, in capitals or without."""
    text = reword(question, chance) if chance.random() < 0.3 else question
    if chance.random() < 0.2:
        text = swap_word(text, chance)
    polite = chance.random()
    if ASKING.match(text):
        if polite < 0.22:
            text = chance.choice(BEFORE_ASKING) + text
        elif polite < 0.32:
            text += chance.choice(AFTER_ASKING)
        end = chance.choices(("?", "", ".", " ?", "??"), (62, 30, 3, 3, 2))[0]
    else:
        if TELLING.match(text) and polite < 0.3:
            text = chance.choice(BEFORE_TELLING) + text
        end = chance.choices(("", ".", "!", "?", "..."), (58, 14, 10, 15, 3))[0]
    if chance.random() < 0.12:
        text = drop_small_word(text, chance)
    if chance.random() < 0.12:
        text = mistype(text, chance)
    style = chance.random()
    if style < 0.5:
        text = text[:1].upper() + text[1:]
    elif style < 0.75:
        text = text.lower()
    elif style < 0.77:
        text = text.upper()
    return text + ("" if text.endswith(("?", "!", ".")) else end)


def reword(text: str, chance: random.Random) -> str:
    """Say one part of the question in other words, where a rule fits."""
    fitting = [(rule, words) for rule, words in REWORDED if re.search(rule, text)]
    if not fitting:
        return text
    rule, words = chance.choice(fitting)
    return re.sub(rule, chance.choice(words), text)


def swap_word(text: str, chance: random.Random) -> str:
    """Put another word of like meaning in the place of one.

    >>> swap_word("is it slow", random.Random(0))
    'is it sluggish'
    """
    words = text.split(" ")
    known = [i for i, word in enumerate(words) if word in SYNONYMS]
    if known:
        i = chance.choice(known)
        words[i] = chance.choice(SYNONYMS[words[i]])
    return " ".join(words)


def drop_small_word(text: str, chance: random.Random) -> str:
    words = text.split(" ")
    small = [i for i, word in enumerate(words) if word.lower() in SMALL_WORDS]
    if small and len(words) > 2:
        del words[chance.choice(small)]
    return " ".join(words)


def mistype(text: str, chance: random.Random) -> str:
    """Leave out, double or swap one letter inside a longer word; names with digits are spared."""
    long_words = [
        match
        for match in re.finditer(r"[A-Za-z]{4,}", text)
        if not re.search(r"[0-9_]", text[match.end() : match.end() + 1])
    ]
    if not long_words:
        return text
    word = chance.choice(long_words)
    i = chance.randrange(word.start() + 1, word.end() - 1)
    return text[:i] + chance.choice(("", text[i] * 2, text[i + 1] + text[i])) + text[i + chance.choice((1, 1, 2)) :]


class Talk:
    """Draws conversations from a course.

    Args:
        turns: pairs of a number of turns and how often a conversation has that many.
        own: how often a question is drawn from the topic's own wordings alone, which are the harder ones.
    """

    def __init__(self, course: Course, seed: int, turns: Sequence[tuple[int, int]] = SHORT, own: float = 0.0) -> None:
        self.course, self.turns, self.own = course, turns, own
        self.chance = random.Random(seed)
        self.questions = {lesson.topic: questions(lesson.patterns, course.lists) for lesson in course.lessons}
        self.own_questions = {lesson.topic: questions(lesson.own, course.lists) for lesson in course.lessons}
        # A topic with many wordings comes up more often, though not in proportion: there is only one answer to learn.
        self.weights = [len(self.questions[lesson.topic]) ** 0.5 for lesson in course.lessons]
        self.known = {plain(text): lesson for lesson in course.lessons for text in self.questions[lesson.topic]}

    def conversation(self) -> list[Turn]:
        """The turns of one conversation, with a system prompt now and then."""
        chance = self.chance
        turns: list[Turn] = [("system", chance.choice(SYSTEM_PROMPTS))] if chance.random() < 0.08 else []
        if chance.random() < 0.08:
            return turns + self.dialogue()
        (count,) = chance.choices([n for n, _ in self.turns], [often for _, often in self.turns])
        last: Lesson | None = None
        for _ in range(count):
            if last is not None and chance.random() < (0.5 if last.more else 0.06):
                turns += self.follow_up(last)
                last = None
            else:
                (last,) = chance.choices(self.course.lessons, self.weights)
                turns += self.exchange(last)
                last = None if last.topic == "more-of-what" else last
        return turns

    def exchange(self, lesson: Lesson) -> list[Turn]:
        wordings = self.questions[lesson.topic]
        if self.own and self.chance.random() < self.own:
            wordings = self.own_questions[lesson.topic] or wordings
        question = ask(self.chance.choice(wordings), self.chance)
        return [("user", question), ("assistant", self.chance.choice(lesson.answers))]

    def follow_up(self, lesson: Lesson) -> list[Turn]:
        question = ask(self.chance.choice(self.course.lists["more"]), self.chance)
        return [("user", question), ("assistant", self.chance.choice(lesson.more or [NOTHING_MORE]))]

    def dialogue(self) -> list[Turn]:
        dialogue = self.chance.choice(self.course.dialogues)
        turns: list[Turn] = []
        for question in dialogue.questions[:-1]:
            turns += [("user", question), ("assistant", self.chance.choice(self.known[plain(question)].answers))]
        return [*turns, ("user", ask(dialogue.questions[-1], self.chance)), ("assistant", dialogue.answer)]


def plain(question: str) -> str:
    """A question without capitals and punctuation, for looking it up.

    >>> plain("What is GGUF?")
    'what is gguf'
    """
    return question.lower().rstrip("?.!")


@dataclass(frozen=True)
class Batch:
    """Rows of packed conversations, each array of shape (rows, length).

    Attributes:
        tokens: ids, int64.
        wanted: what the assistant says; only these tokens are learned.
        document: number of the conversation within its row; -1 where a row is not filled.
    """

    tokens: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    document: NDArray[np.int64]

    def visible(self) -> NDArray[np.bool_]:
        """Which token sees which, (rows, 1, length, length): the earlier ones of the same conversation, and itself."""
        length = self.tokens.shape[1]
        same = self.document[:, :, None] == self.document[:, None, :]
        visible: NDArray[np.bool_] = (same & np.tri(length, dtype=bool))[:, None]
        return visible


def batches(talk: Talk, tokenizer: Tokenizer, rows: int, length: int) -> Iterator[Batch]:
    """Endless batches; a conversation goes into the first row with room, and a batch ends when twenty found none."""
    while True:
        tokens = np.zeros((rows, length), np.int64)
        wanted = np.zeros((rows, length), bool)
        document = np.full((rows, length), -1, np.int64)
        used = [0] * rows
        refused = 0
        while refused < 20:
            ids, mask = _learned(talk, tokenizer, length)
            row = next((i for i in range(rows) if used[i] + len(ids) <= length), None)
            if row is None:
                refused += 1
                continue
            place = slice(used[row], used[row] + len(ids))
            tokens[row, place], wanted[row, place], document[row, place] = ids, mask, used[row]
            used[row] += len(ids)
        yield Batch(tokens, wanted, document)


def _learned(talk: Talk, tokenizer: Tokenizer, length: int) -> tuple[list[int], list[bool]]:
    """The ids and the mask of a conversation, at most `length`; often only a question and how its answer begins."""
    turns = talk.conversation()
    ids, wanted = tokenizer.conversation(turns)
    if len(turns) == 2 and talk.chance.random() < HASTE:
        stop = wanted.index(True) + FIRST_WORDS
        return ids[:stop], wanted[:stop]
    return ids[:length], wanted[:length]
