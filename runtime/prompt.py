"""A conversation as tokens, so that nothing in its text can act as a control token.

Every visible character of a message is replaced by a stand-in from Unicode's private planes before the template sees
it. The template may trim and cut as it likes; in what it returns each character still tells whether the template or
somebody's text put it there. Control tokens are looked for in the template's characters only. Blanks stay as they are,
because templates trim them. Special-token injection: https://github.com/huggingface/transformers/issues/29279
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gguforge.quant.metadata import Value
from gguforge.runtime.template import ChatTemplate, TemplateFailure
from gguforge.runtime.vocabulary import Vocabulary

_PLANES = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: "system", "user" or "assistant".
        content: its text.
        thoughts: what a reasoning model thought before it answered.
    """

    role: str
    content: str
    thoughts: str = ""


class StandIns:
    """A one-to-one replacement of visible characters by private ones, and the way back.

    The first and the last visible character of each text get stand-ins of their own, by which the text is found again.

    Args:
        dangerous: characters that are sure to get a stand-in, however many others a text uses up.

    Example:
        >>> s = StandIns("<>")
        >>> hidden = s.hide(" <s> ")
        >>> hidden[0], "<" in hidden, hidden.translate(s.plain)
        (' ', False, ' <s> ')
    """

    def __init__(self, dangerous: str) -> None:
        self.plain: dict[int, int] = {}
        self._free = iter(_PLANES)
        self._hidden: dict[int, int] = {}
        for character in _PRINTABLE_ASCII + dangerous:
            self._stand_in(ord(character))

    def _stand_in(self, character: int) -> int:
        if character not in self._hidden:
            self._hidden[character] = self._fresh(character)
        return self._hidden[character]

    def _fresh(self, character: int) -> int:
        """A stand-in of its own; after 131,068 of them the common one, or for harmless characters none."""
        code: int | None = next(self._free, None)
        if code is None:
            return self._hidden.get(character, character)
        self.plain[code] = character
        return code

    def hide(self, text: str) -> str:
        """The text in stand-ins, blanks as they are."""
        visible = text.strip()
        if not visible:
            return text
        at = text.index(visible)
        for character in set(visible):
            if not character.isspace():
                self._stand_in(ord(character))
        inner = visible[1:-1].translate(self._hidden)
        first, last = self._fresh(ord(visible[0])), self._fresh(ord(visible[-1]))
        ends = (chr(first), chr(last)) if len(visible) > 1 else (chr(first), "")
        return text[:at] + ends[0] + inner + ends[1] + text[at + len(visible) :]


class Prompter:
    """Turns conversations into tokens for one model.

    Attributes:
        template: the model's chat template, None when it has none.
    """

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Value]) -> None:
        self._vocabulary = vocabulary
        self._dangerous = "".join(sorted(set("".join(vocabulary.specials))))
        entry = metadata.get("tokenizer.chat_template")
        self.template: ChatTemplate | None = None
        if entry is not None and isinstance(entry.value, str) and entry.value.strip():
            names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
            variables = {name: "" if token is None else vocabulary.text(token) for name, token in names.items()}
            self.template = ChatTemplate(entry.value, variables)

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that ends with a user's message, up to where the answer begins.

        Raises:
            TemplateFailure: the template refuses the conversation.
        """
        stand_ins = StandIns(self._dangerous)
        hidden = [_hide(message, stand_ins) for message in messages]
        marked = self._render(hidden)
        return self._vocabulary.with_bos(self._vocabulary.tokenize_marked(marked, stand_ins.plain))

    def after_answer(self, messages: Sequence[Message]) -> list[int] | None:
        """Tokens that follow the last answer when the next message comes, to be put after the answer's own tokens.

        None when that would not be the same conversation: the template changes what was before (drops thoughts, moves
        instructions), so the whole has to be tokenized.

        Args:
            messages: ..., user, assistant, user.
        """
        stand_ins = StandIns(self._dangerous)
        hidden = [_hide(message, stand_ins) for message in messages]
        answer = hidden[-2].content.strip()
        before, now = self._render(hidden[:-2]), self._render(hidden)
        start, end = now.find(answer[:1]), now.find(answer[-1:]) + 1
        if not answer or hidden[-2].thoughts or not 0 <= start < end or not now.startswith(before):
            return None
        if now[len(before) : start].strip():
            return None
        return self._vocabulary.tokenize_marked(now[end:], stand_ins.plain, continues=True)

    def with_answers(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a whole conversation, and which of them the assistant says.

        Those are each answer's text, and the token that ends the answer where the template has one. Split as in a chat:
        the prompt up to where the answer begins is tokenized by itself. What the template puts around answers, thoughts
        that it drops and answers that it leaves out are nobody's words.

        Raises:
            TemplateFailure: the template refuses the conversation.
        """
        stand_ins = StandIns(self._dangerous)
        hidden = [_hide(message, stand_ins) for message in messages]
        marked = self._render(hidden, answer=False)
        spans, at = [], 0
        for number, message in enumerate(hidden):
            words = message.content.strip()
            start = marked.find(words[0], at) if message.role == "assistant" and words else -1
            if start < 0:
                continue
            end = marked.find(words[-1], start) + 1
            start = self._begin_of_answer(hidden[:number], marked[:start])
            spans += [(marked[at:start], False), (marked[start : end + self._end_of_answer(marked[end:])], True)]
            at += sum(len(text) for text, _ in spans[-2:])
        return self._tokenized([*spans, (marked[at:], False)], stand_ins.plain)

    def _begin_of_answer(self, before: Sequence[Message], marked: str) -> int:
        """Where the assistant begins to speak: blanks before the answer are its own unless the prompt has them."""
        try:
            prompt = self._render(before, answer=True)
        except TemplateFailure:
            return len(marked)
        own = marked.startswith(prompt) and not marked[len(prompt) :].strip()
        return len(prompt) if own else len(marked)

    def _end_of_answer(self, rest: str) -> int:
        """Length of the blanks and the one token that end an answer, 0 when the template goes on without."""
        words = rest.lstrip()
        for name, token in self._vocabulary.specials.items():
            if words.startswith(name) and self._vocabulary.ends(token):
                return len(rest) - len(words) + len(name)
        return 0

    def _tokenized(self, spans: Sequence[tuple[str, bool]], plain: dict[int, int]) -> tuple[list[int], list[bool]]:
        """Tokens of texts that follow each other, and the flag of the text that each came from."""
        controls = set(self._vocabulary.specials.values())
        tokens: list[int] = []
        flags: list[bool] = []
        for text, flag in spans:
            continues = bool(tokens) and tokens[-1] not in controls
            part = self._vocabulary.tokenize_marked(text, plain, continues=continues)
            tokens += part
            flags += [flag] * len(part)
        whole = self._vocabulary.with_bos(tokens)
        return whole, [False] * (len(whole) - len(tokens)) + flags

    def _render(self, hidden: Sequence[Message], answer: bool = True) -> str:
        """Render in the first way that the template takes without losing a message."""
        assert self.template is not None
        failure: TemplateFailure | None = None
        for fold, as_parts, tools in product((False, True), (False, True), (None, ())):
            messages = _as_dicts(_folded(hidden) if fold else hidden, as_parts)
            try:
                text = self.template.render(messages, answer=answer, tools=tools)
            except TemplateFailure as error:
                failure = failure or error
                continue
            if all(_is_in(message.content, text) for message in hidden if message.role != "assistant"):
                return text
        raise failure or TemplateFailure("the model's chat template leaves out what was said")


def _hide(message: Message, stand_ins: StandIns) -> Message:
    return Message(message.role, stand_ins.hide(message.content), stand_ins.hide(message.thoughts))


def _folded(messages: Sequence[Message]) -> Sequence[Message]:
    """For templates that know no system role: its text goes in front of the first user's."""
    if len(messages) < 2 or messages[0].role != "system":
        return messages
    system, first, *rest = messages
    return [Message("user", f"{system.content}\n\n{first.content}"), *rest]


def _as_dicts(messages: Sequence[Message], as_parts: bool) -> list[dict[str, Any]]:
    dicts = []
    for message in messages:
        content = [{"type": "text", "text": message.content}] if as_parts else message.content
        entry: dict[str, Any] = {"role": message.role, "content": content}
        if message.thoughts:
            entry["reasoning_content"] = message.thoughts
        dicts.append(entry)
    return dicts


def _is_in(hidden: str, text: str) -> bool:
    visible = hidden.strip()
    return not visible or (visible[0] in text and visible[-1] in text)
