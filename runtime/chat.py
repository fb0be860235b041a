"""A conversation with a model: turns, what the context holds of them, and what happens when it is full.

The tokens of what was said are kept as they were generated, so a follow-up evaluates only what is new. It prints
nothing: answers are iterators of text, remarks go to a callback.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from gguforge.quant.errors import InputError
from gguforge.runtime.engine import Engine, Stats
from gguforge.runtime.loaded import Closing
from gguforge.runtime.prompt import Message, Prompter
from gguforge.runtime.sampling import Sampling
from gguforge.runtime.transcript import read_transcript, write_transcript
from gguforge.runtime.vocabulary import Detokenizer

_THOUGHTS_END = "</think>"


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        user, answer: the texts.
        thoughts: what a reasoning model thought first.
        cut: the answer was stopped before its end.
        history_before: tokens of the history that came before this turn; None when they are not known exactly.
    """

    user: str
    answer: str
    thoughts: str = ""
    cut: bool = False
    history_before: int | None = None


class ChatSession(Closing):
    """Asks, remembers, forgets.

    Args:
        engine: an open engine.
        system: instructions that stay in front.
        sampling: None for the file's own settings.
        max_tokens: most tokens of an answer; None for as many as the context holds.
        notice: called with a line for the user when something happens that an answer does not show.

    Attributes:
        turns: what was said.
        stats: figures of the last answer.
        totals: figures of all answers of this session.

    Raises:
        TemplateFailure: the file's chat template has a fault.
        GGUFError: the file's sampling settings make no sense.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine = engine
        self.turns: list[Turn] = []
        self.stats = Stats()
        self.totals = Stats()
        self.max_tokens = max_tokens
        self._prompter = Prompter(engine.vocabulary, engine.file.metadata)
        self._sampler = engine.sampler(sampling or Sampling.from_metadata(engine.file.metadata))
        self._system = system or ""
        self.notice = notice
        self._history: list[int] | None = None  # tokens of all turns, as they were evaluated
        self._told_full = False

    @property
    def has_template(self) -> bool:
        """Whether the model can chat; otherwise it continues the text."""
        return self._prompter.template is not None

    @property
    def sampling(self) -> Sampling:
        """The settings in use, with the seed that was drawn."""
        return self._sampler.settings

    @property
    def system(self) -> str:
        """Instructions that stay in front; setting them keeps the turns."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        self._system = text
        self._forget_tokens()

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer piece by piece; what was yielded is remembered even if the caller stops early.

        Raises:
            InputError: the text alone does not fit the context, or the template refuses it.
            EngineError: llama.cpp failed.
        """
        self.engine.resume()
        self.stats = Stats()
        prompt = self._prompt(text)
        known = self._history is not None and prompt[: len(self._history)] == self._history
        before = len(self._history) if known and self._history is not None else None
        return self._answer(Turn(text, "", history_before=before), prompt)

    def _answer(self, turn: Turn, prompt: list[int]) -> Generator[str, None, None]:
        generated: list[int] = []
        pieces: list[str] = []
        try:
            for piece in self._pieces(turn.user, prompt, generated):
                pieces.append(piece)
                yield piece
        finally:
            self._remember(turn, prompt, generated, "".join(pieces))

    def _pieces(self, text: str, prompt: list[int], generated: list[int]) -> Iterator[str]:
        """The answer's text; when the context fills up, older turns make room and it goes on."""
        detokenizer, began = Detokenizer(self.engine.vocabulary), not self.has_template
        while True:
            with contextlib.closing(
                self.engine.generate(prompt + generated, self._sampler, self.stats, self.max_tokens)
            ) as tokens:
                for token in tokens:
                    generated.append(token)
                    piece = detokenizer.push(token)
                    piece = piece if began else piece.lstrip()
                    if piece:
                        began = True
                        yield piece
            if self.stats.stop != "context" or not self._make_room(text, prompt, len(generated)):
                break
        if rest := detokenizer.finish():
            yield rest

    def _make_room(self, text: str, prompt: list[int], answered: int) -> bool:
        """Drop oldest turns until a quarter of the context is free; whether an answer of so many tokens can go on."""
        context = self.engine.context
        if not self.turns:
            return False
        while self.turns and len(prompt) + answered > context - context // 4:
            self._drop_oldest()
            prompt[:] = self._whole(text)
        return len(prompt) + answered <= context

    def _prompt(self, text: str) -> list[int]:
        """Tokens up to where the answer begins; oldest turns are dropped until they fit."""
        context = self.engine.context
        room = min(self.max_tokens or context, context // 4)
        tokens = self._following(text) or self._whole(text)
        if len(tokens) <= context - room:
            return tokens
        alone = len(self._whole(text, turns=[]))
        if alone >= context:
            raise InputError(
                "the text does not fit the context",
                expected=f"fewer than {context} tokens",
                found=f"{alone} tokens",
                remedy="Shorten it, or give the model more room with --context.",
            )
        while self.turns and len(tokens) > max(alone, context - 2 * room):
            self._drop_oldest()
            tokens = self._whole(text)
        return tokens

    def _following(self, text: str) -> list[int] | None:
        """The history's own tokens and the new ones after them, where that is the same conversation."""
        if self._history is None or not self.turns:
            return None
        if not self.has_template:
            return self._history + self.engine.vocabulary.tokenize_plain(text, continues=True)
        new = self._prompter.after_answer(self._messages(self.turns, text))
        return None if new is None else self._history + new

    def _whole(self, text: str, turns: list[Turn] | None = None) -> list[int]:
        turns = self.turns if turns is None else turns
        if self.has_template:
            return self._prompter.whole(self._messages(turns, text))
        parts = [self._system, "\n\n"] if self._system else []
        parts += [part for turn in turns for part in (turn.user, turn.answer)]
        vocabulary = self.engine.vocabulary
        tokens = vocabulary.with_bos(vocabulary.tokenize_plain("".join([*parts, text])))
        if not tokens:
            raise InputError("there is no text to continue")
        return tokens

    def _messages(self, turns: list[Turn], text: str) -> list[Message]:
        messages = [Message("system", self._system)] if self._system else []
        for turn in turns:
            messages += [Message("user", turn.user), Message("assistant", turn.answer, turn.thoughts)]
        return [*messages, Message("user", text)]

    def _drop_oldest(self) -> None:
        del self.turns[0]
        self._forget_tokens()
        if not self._told_full:
            self._told_full = True
            self.notice(f"The context of {self.engine.context} tokens is full: the oldest turns are forgotten.")

    def _remember(self, turn: Turn, prompt: list[int], generated: list[int], text: str) -> None:
        self.stats.stop = self.stats.stop or "interrupted"
        for name in (
            "prompt_tokens",
            "evaluated_tokens",
            "generated_tokens",
            "first_token_seconds",
            "generation_seconds",
        ):
            setattr(self.totals, name, getattr(self.totals, name) + getattr(self.stats, name))
        if not generated and self.stats.stop == "interrupted":
            return  # stopped while it was still reading: nothing was said
        turn.cut = self.stats.stop != "end"
        if self._history is None:
            turn.history_before = None  # turns were dropped in the middle of the answer
        turn.thoughts, turn.answer = _split_thoughts(text) if self.has_template else ("", text)
        self.turns.append(turn)
        self._history = prompt + generated

    def _forget_tokens(self) -> None:
        self._history = None
        for turn in self.turns:
            turn.history_before = None

    def undo(self) -> str | None:
        """Take the last turn back and return its question; None when there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        if self._history is None or turn.history_before is None:
            self._forget_tokens()
        else:
            del self._history[turn.history_before :]
        return turn.user

    def retry(self) -> Generator[str, None, None]:
        """Take the last turn back and ask its question again.

        Raises:
            InputError: nothing was asked yet.
        """
        text = self.undo()
        if text is None:
            raise InputError("there is nothing to retry")
        return self.ask(text)

    def clear(self) -> None:
        """Forget all turns; the system text stays."""
        self.turns.clear()
        self._history = None
        self._told_full = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON; see `transcript`."""
        cut = [turn.cut for turn in self.turns]
        write_transcript(path, self._messages(self.turns, "")[:-1], cut, model=self.engine.file.path.name)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the conversation by a saved one; see `transcript`."""
        messages, cut = read_transcript(path)
        system = [message.content for message in messages if message.role == "system"]
        said = [message for message in messages if message.role != "system"]
        self.clear()
        self._system = system[0] if system else ""
        for user, answer, was_cut in zip(said[::2], said[1::2], cut, strict=True):
            self.turns.append(Turn(user.content, answer.content, answer.thoughts, was_cut))

    def close(self) -> None:
        """Free the sampler; the engine is the caller's."""
        self._sampler.close()


def _split_thoughts(text: str) -> tuple[str, str]:
    """Thoughts and answer: `<think>a</think>b` -> ("a", "b")."""
    head, mark, tail = text.rpartition(_THOUGHTS_END)
    if not mark:
        return "", text.strip()
    return head.strip().removeprefix("<think>").strip(), tail.strip()


def answer_once(
    path: str | os.PathLike[str],
    prompt: str,
    *,
    system: str | None = None,
    sampling: Sampling | None = None,
    max_tokens: int | None = 256,
    context: int | None = None,
    threads: int | None = None,
) -> str:
    """Load a file, answer one prompt, free everything.

    Args:
        sampling: None for the file's own settings; `GREEDY` for an answer that does not depend on chance.

    Raises:
        GGUForgeError: as `Engine.open` and `ChatSession.ask`.
    """
    with (
        Engine.open(path, context=context, threads=threads) as engine,
        ChatSession(engine, system=system, sampling=sampling, max_tokens=max_tokens) as session,
    ):
        return "".join(session.ask(prompt)).strip()
