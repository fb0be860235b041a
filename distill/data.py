"""Text files cut into shards, and each shard's text into documents of tokens with a mask of those that count.

Where the text is cut into shards is decided on bytes alone, so a process that makes one shard tokenizes no other.

    plain text    cut at line ends into passages, each tokenized by itself and cut into documents of `context` tokens;
                  every token counts (but the very first of a document, which nothing comes before)
    .jsonl        one value a line: {"text": "..."} is plain text; {"messages": [...]} or a list of messages is a
                  conversation through the chat template, one document. What the assistant says counts, in every turn,
                  with the token that ends the turn; what the template adds does not. What is longer than `context` is
                  cut off.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.shards import Ids
from gguforge.distill.targets import TextRecord
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError
from gguforge.quant.sources import map_window
from gguforge.runtime.chunks import CONVERSATIONS_SUFFIX, conversation, read_line

PASSAGE_BYTES = 1 << 16
_BYTES_A_TOKEN = 16  # passages are long enough to fill documents of `context` tokens

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Passage:
    """A part of a file that is tokenized by itself."""

    path: Path
    start: int
    stop: int
    line: int  # of a .jsonl file, counted from 1; 0 in plain text

    def read(self) -> bytes:
        """Its bytes."""
        return map_window(str(self.path), self.start, self.stop - self.start).tobytes()


@dataclass(frozen=True)
class Corpus:
    """Text files, cut into shards.

    Attributes:
        records: the files.
        shards: the passages of each shard.
        conversations: whether any passage is one.
    """

    records: tuple[TextRecord, ...]
    shards: tuple[tuple[Passage, ...], ...]
    conversations: bool

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of text in each shard."""
        return tuple(sum(passage.stop - passage.start for passage in shard) for shard in self.shards)


def read_corpus(paths: Sequence[str | os.PathLike[str]], context: int, shard_bytes: int) -> Corpus:
    """Hash the files, see that every line of a .jsonl file is understood, and cut them into shards.

    Args:
        context: tokens of a document.
        shard_bytes: a passage belongs to the shard in whose bytes it begins.

    Raises:
        InputError: a file is empty or a line is neither text nor a conversation.
        OSError: a file cannot be read.
    """
    records, passages, conversations = [], [], False
    for path in map(Path, paths):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise InputError("the file is empty", path=path)
            records.append(TextRecord(path.name, digest, size))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if path.suffix == CONVERSATIONS_SUFFIX:
                    found, talk = _lines(path, data)
                    conversations |= talk
                else:
                    found = _passages(path, data, max(PASSAGE_BYTES, _BYTES_A_TOKEN * context))
        passages += found
    if not passages:
        raise InputError("there is no text", path=paths[0])
    sizes = np.array([passage.stop - passage.start for passage in passages])
    shard = (np.cumsum(sizes) - sizes) // shard_bytes
    cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(passages)]
    shards = tuple(tuple(passages[first:last]) for first, last in pairwise(cuts))
    return Corpus(tuple(records), shards, conversations)


def _passages(path: Path, data: mmap.mmap, size: int) -> list[Passage]:
    """Plain text in pieces of at most `size` bytes, cut after a line's end, or else before a character."""
    passages, start = [], 0
    while start < len(data):
        stop = min(start + size, len(data))
        if stop < len(data):
            line = data.rfind(b"\n", start, stop) + 1
            stop = line or _character_before(data, stop)
        passages.append(Passage(path, start, stop, 0))
        start = stop
    return passages


def _character_before(data: mmap.mmap, stop: int) -> int:
    """The last place up to `stop` where no UTF-8 character is cut; `stop` itself where the text is not UTF-8."""
    return next((place for place in range(stop, stop - 4, -1) if data[place] & 0xC0 != 0x80), stop)


def _lines(path: Path, data: mmap.mmap) -> tuple[list[Passage], bool]:
    """The lines that are not blank, all of them checked, and whether one is a conversation."""
    passages, talk, start, number = [], False, 0, 0
    while start < len(data):
        number += 1
        stop = data.find(b"\n", start) + 1 or len(data)
        line = data[start:stop]
        if line.strip():
            value = read_line(line)
            messages = conversation(value)
            talk |= messages is not None
            if messages is None and not _is_text(value):
                raise InputError(
                    f"line {number} is neither text nor a conversation", path=path,
                    expected='{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
                )  # fmt: skip
            passages.append(Passage(path, start, stop, number))
        start = stop
    return passages, talk


def _is_text(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def documents(passage: Passage, tokenizer: Tokenizer, context: int) -> Iterator[tuple[Ids, Mask]]:
    """A passage's documents: token ids and which of them count; those in which none does are left out.

    Raises:
        InputError: the model has no chat template, or it refuses a conversation.
    """
    data = passage.read()
    if not passage.line:
        yield from _windows(tokenizer.plain(data.decode("utf-8", "replace")), tokenizer.bos, context)
        return
    value = read_line(data)
    messages = conversation(value)
    if messages is None:
        yield from _windows(tokenizer.plain(value["text"]), tokenizer.bos, context)
        return
    try:
        ids, mask = tokenizer.conversation(messages)
    except InputError as error:
        raise InputError(f"line {passage.line}: {error.what}", path=passage.path, remedy=error.remedy) from error
    mask = mask[:context].copy()
    mask[:1] = False
    if mask.any():
        yield ids[:context], mask


def _windows(ids: Ids, bos: int | None, context: int) -> Iterator[tuple[Ids, Mask]]:
    """Documents of `context` tokens; each begins with the token that begins texts."""
    first = [] if bos is None else [bos]
    body = ids[len(first) :]
    step = context - len(first)
    for start in range(0, len(body), step):
        window = np.array([*first, *body[start : start + step]], np.int32)
        if len(window) > 1:
            mask = np.ones(len(window), np.bool_)
            mask[0] = False
            yield window, mask
