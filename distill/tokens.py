"""A teacher's tokenizer, whatever the teacher is: llama.cpp's, from a GGUF file or from a checkpoint's files.

A checkpoint's tokenizer is converted as `gguforge convert` does it, into a file without weights. So all teachers, and
the student in the end, cut text into the same tokens by the same code.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gguforge.convert.conversion import plan_vocabulary
from gguforge.distill.shards import Ids
from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.metadata import Value
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write
from gguforge.runtime.checks import check_runnable
from gguforge.runtime.library import library, load_model
from gguforge.runtime.loaded import Closing
from gguforge.runtime.prompt import Message, Prompter
from gguforge.runtime.vocabulary import Vocabulary

_UNUSED = 5  # llama.cpp's token type for padding


@dataclass(frozen=True)
class Identity:
    """What a tokenizer is known by.

    Attributes:
        tokens: how many it has, padding at the end left out.
        sha256: over their names in order, hexadecimal.
        template_sha256: of the chat template, "" when there is none.
    """

    tokens: int
    sha256: str
    template_sha256: str


class Tokenizer(Closing):
    """Turns text and conversations into tokens.

    Args:
        model: llama.cpp's, which is freed with this when `owned`.
        metadata: of the file it came from.
    """

    def __init__(self, model: Any, metadata: Mapping[str, Value], *, owned: bool = False) -> None:
        self._model, self._owned = model, owned
        self._vocabulary = Vocabulary(model)
        self._prompter = Prompter(self._vocabulary, metadata)
        self.size = self._vocabulary.size
        self.identity = identity(metadata)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a GGUF file, or of a folder with config.json and a tokenizer's files.

        Raises:
            InputError: there is none, or it is damaged or not understood.
        """
        path = Path(path)
        if path.is_dir():
            made = plan_vocabulary(path, warn=lambda line: None)
            with tempfile.TemporaryDirectory() as folder:
                vocabulary = Path(folder) / "vocabulary.gguf"
                write(made, vocabulary)
                return cls(load_model(vocabulary, vocab_only=True), made.metadata, owned=True)
        file = read_gguf(path)
        if file.tensors:
            check_runnable(file)
        _names(file.metadata)
        return cls(load_model(path, vocab_only=True), file.metadata, owned=True)

    def close(self) -> None:
        """Free what was loaded; a second call does nothing."""
        if self._owned and self._model:
            library().llama_model_free(self._model)
        self._model = None

    @property
    def bos(self) -> int | None:
        """The token that every text begins with, None when none does."""
        return self._vocabulary.bos if self._vocabulary.add_bos else None

    def plain(self, text: str) -> Ids:
        """Tokens of a text, with the one that begins texts; nothing in it acts as a control token."""
        return np.array(self._vocabulary.with_bos(self._vocabulary.tokenize_plain(text)), np.int32)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Ids, NDArray[np.bool_]]:
        """Tokens of a conversation through the chat template, and which of them the assistant says.

        Raises:
            InputError: there is no chat template, or it refuses the conversation.
        """
        if self._prompter.template is None:
            raise InputError("the model has no chat template", remedy="Give plain text instead of conversations.")
        said = [Message(m["role"], m["content"], m.get("reasoning_content") or "") for m in messages]
        tokens, flags = self._prompter.with_answers(said)
        return np.array(tokens, np.int32), np.array(flags, np.bool_)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation up to where the assistant's next answer begins; errors as `conversation`."""
        if self._prompter.template is None:
            raise InputError("the model has no chat template", remedy="Use a teacher that was trained to chat.")
        return self._prompter.whole([Message(m["role"], m["content"]) for m in messages])

    def ends(self) -> frozenset[int]:
        """The tokens that end a text or a turn."""
        return frozenset(token for token in range(self.size) if self._vocabulary.ends(token))

    def names(self) -> list[str]:
        """What the vocabulary calls each token."""
        return [self._vocabulary.text(token) for token in range(self.size)]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens left out; wrong bytes become U+FFFD."""
        return b"".join(map(self._vocabulary.piece, tokens)).decode("utf-8", "replace")


def identity_of(path: str | os.PathLike[str]) -> Identity:
    """What the tokenizer of a GGUF file or of a checkpoint's folder is known by, read without llama.cpp.

    Raises:
        GGUForgeError: there is none, or it is damaged or not understood.
    """
    path = Path(path)
    made = plan_vocabulary(path, warn=lambda line: None) if path.is_dir() else read_gguf(path)
    return identity(made.metadata)


def identity(metadata: Mapping[str, Value]) -> Identity:
    """What the tokenizer in a file's metadata is known by.

    Raises:
        GGUFError: there is none, or its lists are damaged.
    """
    names, types = _names(metadata)
    count = len(names)
    while count and types[count - 1] == _UNUSED:
        count -= 1
    digest = hashlib.sha256("\0".join(names[:count]).encode("utf-8", "surrogatepass")).hexdigest()
    template = metadata.get("tokenizer.chat_template")
    text = template.value if template is not None and isinstance(template.value, str) else ""
    return Identity(count, digest, hashlib.sha256(text.encode()).hexdigest() if text else "")


def _names(metadata: Mapping[str, Value]) -> tuple[list[str], list[int]]:
    """The tokens' names and types."""
    names = metadata.get("tokenizer.ggml.tokens")
    if names is None:
        raise GGUFError("has no tokenizer", expected="the metadata key tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    types = kinds.value if kinds is not None else [1] * len(names.value)  # type: ignore[arg-type]
    lists = isinstance(names.value, list) and isinstance(types, list) and len(names.value) == len(types)
    if not lists or not all(isinstance(name, str) for name in names.value):  # type: ignore[union-attr]
        raise GGUFError("tokenizer.ggml.tokens or token_type is damaged")
    return names.value, types  # type: ignore[return-value]
