"""Text as an encoder reads it: [CLS] words [SEP], cut by the tokenizer that the checkpoint was trained with.

That is transformers' own, for llama.cpp's WordPiece turns every letter into a small one, whatever the model was trained
on. Nothing in a text acts as a special token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.batches import ALL_TEXT, evenly, untaught
from gguforge.distill.data import Passage, read_corpus
from gguforge.distill.shards import Document, Ids
from gguforge.distill.students import load
from gguforge.quant.errors import InputError
from gguforge.runtime.chunks import read_line


@dataclass(frozen=True, eq=False)
class Words:
    """A vocabulary, as far as hiding words needs it.

    Attributes:
        mask, pad: the tokens that stand for a hidden word and for nothing.
        size: tokens in all.
        ordinary: the tokens that are not special, shape (N,), int64.
    """

    mask: int
    pad: int
    size: int
    ordinary: NDArray[np.int64]

    @cached_property
    def is_ordinary(self) -> NDArray[np.bool_]:
        """The same as flags, one for every token."""
        flags = np.zeros(self.size, np.bool_)
        flags[self.ordinary] = True
        return flags


class EncoderText:
    """A checkpoint's tokenizer.

    Raises:
        InputError: there is none, or it has no tokens for the beginning and the end of a text.
        MissingExtraError: transformers is not installed.
    """

    def __init__(self, folder: Path) -> None:
        auto = load("transformers").AutoTokenizer
        try:
            self._tokenizer: Any = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"tokenizer cannot be opened: {str(error).splitlines()[0]}", path=folder) from None
        self.folder = folder
        self._first, self._last = self._special("cls"), self._special("sep")

    def _special(self, name: str) -> int:
        found = getattr(self._tokenizer, f"{name}_token_id")
        if found is None:
            raise InputError(f"the tokenizer has no {name} token", path=self.folder, remedy="Is this an encoder?")
        return int(found)

    def words(self) -> Words:
        """What hiding words needs; errors as the class."""
        size = len(self._tokenizer)
        ordinary = np.setdiff1d(np.arange(size), self._tokenizer.all_special_ids)
        return Words(self._special("mask"), self._special("pad"), size, ordinary)

    def check_same(self, teacher: Path) -> None:
        """Make sure that a teacher reads the same tokens.

        Raises:
            InputError: it has another tokenizer.
        """
        if self._tokenizer.get_vocab() != EncoderText(teacher)._tokenizer.get_vocab():
            raise InputError(
                "the student's tokenizer is not its teacher's", path=self.folder, expected=f"that of {teacher}",
                remedy="Take a student of the same family, or one from a config.",
            )  # fmt: skip

    @property
    def pad(self) -> int:
        """The token that stands for nothing."""
        return self._special("pad")

    def documents(
        self, paths: Sequence[str | os.PathLike[str]], context: int, *, lines: bool = False, limit: int | None = None
    ) -> list[Document]:
        """Text files as documents of at most `context` tokens, special ones included.

        Args:
            lines: every line of a plain text is a document, cut off where it is too long; else the text is cut into
                documents of `context` tokens. So is each {"text": "..."} of a .jsonl file.
            limit: take so many at most, evenly from the whole.

        Raises:
            InputError: a file is empty or damaged, holds conversations, or gives no document.
        """
        corpus = read_corpus(paths, context, ALL_TEXT)
        if corpus.conversations:
            raise InputError("conversations are nothing for an encoder", path=Path(paths[0]))
        passages = (passage for shard in corpus.shards for passage in shard)
        texts = (text for passage in passages for text in texts_of(passage, lines))
        found = [self._document(ids) for text in texts for ids in self._cut(text, context, lines)]
        if not found:
            raise InputError("the text gives no document", path=Path(paths[0]))
        return evenly(found, limit)

    def _cut(self, text: str, context: int, once: bool) -> Iterator[Ids]:
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        step = context - 2
        for start in range(0, min(len(ids), step) if once else len(ids), step):
            yield np.array([self._first, *ids[start : start + step], self._last], np.int32)

    def _document(self, ids: Ids) -> Document:
        return untaught(ids, np.zeros(len(ids), np.bool_))


def texts_of(passage: Passage, lines: bool) -> list[str]:
    """A passage's texts: its lines, or all of it."""
    data = passage.read()
    text: str = read_line(data)["text"] if passage.line else data.decode("utf-8", "replace")
    return text.splitlines() if lines and not passage.line else [text]
