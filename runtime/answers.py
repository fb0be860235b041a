"""The same prompts answered by several models, token by token the likeliest, and where the answers part.

It needs no reference text and measures nothing: it shows people what the figures mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from gguforge.runtime.chat import ChatSession
from gguforge.runtime.engine import Engine
from gguforge.runtime.interrupt import deferred_signals
from gguforge.runtime.sampling import GREEDY


@dataclass(frozen=True)
class Piece:
    """Some text of an answer.

    Attributes:
        text: one token's, or several tokens' where one alone is no whole character.
        differs: whether the reference's answer does not have it here.
    """

    text: str
    differs: bool = False


Answer = tuple[Piece, ...]


def answers(
    model: str | os.PathLike[str], prompts: Sequence[str], *, tokens: int, context: int, threads: int | None = None
) -> list[Answer]:
    """What a model says to each prompt, each in a conversation of its own; at most so many tokens.

    Raises:
        GGUForgeError: llama.cpp cannot run the model, or a prompt does not fit.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came.
    """
    found = []
    with (
        Engine.open(model, context=context, threads=threads) as engine,
        deferred_signals(engine.interrupt) as signals,
    ):
        session = ChatSession(engine, sampling=GREEDY, max_tokens=tokens)
        for prompt in prompts:
            session.clear()
            found.append(tuple(Piece(text) for text in session.ask(prompt)))
            signals.raise_if_came()
    return found


def marked(answer: Answer, reference: Answer) -> Answer:
    """An answer with the pieces marked that are not the reference's.

    >>> [piece.differs for piece in marked((Piece("a"), Piece("c")), (Piece("a"), Piece("b")))]
    [False, True]
    """
    same = set(_shared([piece.text for piece in answer], [piece.text for piece in reference]))
    return tuple(Piece(piece.text, i not in same) for i, piece in enumerate(answer))


def _shared(ours: list[str], theirs: list[str]) -> Iterator[int]:
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        yield from range(block.a, block.a + block.size)
