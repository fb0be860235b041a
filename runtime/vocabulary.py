"""Text to tokens and back, for text that is trusted (a template's) and text that is not (a user's or a file's).

Control tokens come out of trusted text only. Untrusted text is tokenized as plain text, and what comes back is checked:
should a control token appear after all, the text is cut inside the words that name it and tokenized in pieces.
The tokenizer itself is llama.cpp's (llama_tokenize); this module decides what it is allowed to see.
"""

from __future__ import annotations

import codecs
import ctypes
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from gguforge.quant.errors import EngineError, InputError
from gguforge.runtime.library import library

MAX_TEXT_BYTES = 64 << 20  # llama.cpp counts bytes in 32 bits (CVE-2025-52566); no context is near this
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1, 8, 16, 128, 256  # llama_token_attr
_MARKUP = re.compile(r"[<>\[\]{}|｜]")
_GUARD = "\x01"  # a character that no vocabulary merges with its neighbours


class Vocabulary:
    """The tokenizer of a loaded model.

    Attributes:
        size: number of tokens.
        bos, eos: token ids, None when the vocabulary has none.
        add_bos: whether a text begins with `bos`.
        specials: ids by text, of every token that trusted text may name: control tokens, user-defined ones (`<think>`)
            and the unknown token; tokens of blanks only are plain text.
    """

    def __init__(self, model: Any) -> None:
        self._llama = llama = library()
        self._pointer = llama.llama_model_get_vocab(model)
        if llama.llama_vocab_type(self._pointer) == 0:
            raise EngineError("the file has no tokenizer, so there is nothing to chat with")
        self.size = int(llama.llama_vocab_n_tokens(self._pointer))
        self.bos = self._known(llama.llama_vocab_bos(self._pointer))
        self.eos = self._known(llama.llama_vocab_eos(self._pointer))
        self.add_bos = bool(llama.llama_vocab_get_add_bos(self._pointer)) and self.bos is not None
        self._attributes = [int(llama.llama_vocab_get_attr(self._pointer, token)) for token in range(self.size)]
        self.specials = self._find_specials()
        self.forbidden = frozenset(self._find_forbidden())

    @staticmethod
    def _known(token: int) -> int | None:
        return token if token >= 0 else None

    def _find_specials(self) -> dict[str, int]:
        wanted = _UNKNOWN | _CONTROL | _USER_DEFINED
        named = {self.text(token): token for token, attr in enumerate(self._attributes) if attr & wanted}
        return {text: token for text, token in named.items() if text.strip()}

    def _find_forbidden(self) -> Iterable[int]:
        """What untrusted text may never become: control tokens, end tokens, and user-defined ones that are markup."""
        for token, attr in enumerate(self._attributes):
            markup = attr & _USER_DEFINED and _MARKUP.search(self.text(token))
            if attr & _CONTROL or markup:
                yield token

    def text(self, token: int) -> str:
        """The token's name as the vocabulary spells it."""
        return str(self._llama.llama_vocab_get_text(self._pointer, token).decode("utf-8", "replace"))

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(self._llama.llama_vocab_is_eog(self._pointer, token))

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._llama.llama_token_to_piece(self._pointer, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _forbidden_pattern(self) -> re.Pattern[str]:
        names = sorted({self.text(token) for token in self.forbidden} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _guard_tokens(self) -> list[int]:
        return self._call(_GUARD)

    def _call(self, text: str, special: bool = False) -> list[int]:
        data = text.encode("utf-8", "replace")
        if len(data) > MAX_TEXT_BYTES:
            raise InputError(
                "the text is too long", expected=f"at most {MAX_TEXT_BYTES} bytes", found=f"{len(data)} bytes"
            )
        room = len(data) + 16
        tokens = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(self._pointer, data, len(data), tokens, room, False, special)
        if count < 0:
            room = -count
            tokens = (ctypes.c_int32 * room)()
            count = self._llama.llama_tokenize(self._pointer, data, len(data), tokens, room, False, special)
        return tokens[: max(count, 0)]

    def tokenize_plain(self, text: str, *, continues: bool = False) -> list[int]:
        """Tokens of untrusted text; never one of `forbidden`.

        Args:
            text: anything.
            continues: other plain text comes before it, so the tokenizer must not put its leading blank there.
        """
        if not text:
            return []
        tokens = self._continued(text) if continues else self._call(text)
        if self.forbidden.isdisjoint(tokens):
            return tokens
        pieces = self._cut(text)
        if len(pieces) == 1 and len(text) == 1:
            return [token for token in tokens if token not in self.forbidden]
        head, *rest = pieces if len(pieces) > 1 else list(text)
        tokens = self.tokenize_plain(head, continues=continues)
        for piece in rest:
            tokens += self.tokenize_plain(piece, continues=True)
        return tokens

    def _continued(self, text: str) -> list[int]:
        """As the library, without the blank that some vocabularies put before the first word of a call."""
        guard = self._guard_tokens
        tokens = self._call(_GUARD + text)
        return tokens[len(guard) :] if tokens[: len(guard)] == guard else self._call(text)

    def _cut(self, text: str) -> list[str]:
        """The text in pieces none of which names a forbidden token whole: `a<s>b` -> `a<`, `s>b`."""
        pieces, start = [], 0
        for match in self._forbidden_pattern.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [piece for piece in (*pieces, text[start:]) if piece]

    def tokenize_marked(self, text: str, plain: dict[int, int], *, continues: bool = False) -> list[int]:
        """Tokens of a rendered template in which every untrusted character was replaced by a stand-in.

        Args:
            text: the rendered text; control tokens are found in it as it stands.
            plain: `str.translate` table from stand-ins to the characters they stand for.
            continues: see `tokenize_plain`.
        """
        tokens: list[int] = []
        start, strip_next = 0, False
        for match in (*self._special_pattern.finditer(text), None):
            run = text[start : match.start() if match else len(text)]
            attr = self._attributes[self.specials[match[0]]] if match else 0
            run = run.lstrip() if strip_next else run
            run = run.rstrip() if attr & _LSTRIP else run
            tokens += self.tokenize_plain(run.translate(plain), continues=continues)
            if match:
                tokens.append(self.specials[match[0]])
                start, strip_next, continues = match.end(), bool(attr & _RSTRIP), False
        return tokens

    def with_bos(self, tokens: list[int]) -> list[int]:
        """The tokens with the beginning-of-text token in front, once, if the vocabulary wants it."""
        if not self.add_bos or tokens[:1] == [self.bos]:
            return tokens
        assert self.bos is not None
        return [self.bos, *tokens]


class Detokenizer:
    """Tokens to text as they come: bytes of an unfinished character wait for the rest, wrong ones become U+FFFD.

    Example: pieces b"caf", b"\\xc3", b"\\xa9" -> "caf", "", "é".
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._piece = vocabulary.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes."""
        return self._decoder.decode(self._piece(token))

    def finish(self) -> str:
        """What was still waiting."""
        return self._decoder.decode(b"", final=True)
