"""A text file as chunks of tokens, cut the way llama-imatrix and llama-perplexity cut it.

The text is tokenized as a whole and cut every so many tokens; what is left at the end is dropped. A .jsonl file holds
conversations, one a line, which go through the model's chat template first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.quant.errors import InputError
from gguforge.runtime.forward import Forward, Tokens
from gguforge.runtime.overlap import fingerprint
from gguforge.runtime.prompt import Prompter, StandIns
from gguforge.runtime.template import TemplateFailure
from gguforge.runtime.vocabulary import Vocabulary

CONVERSATIONS_SUFFIX = ".jsonl"


@dataclass(frozen=True, eq=False)
class Text:
    """A text ready to be read.

    Attributes:
        name: the file as it was given.
        sha256: of the file's bytes, hexadecimal.
        chunks: shape (chunks, tokens of a chunk).
    """

    name: str
    sha256: str
    chunks: Tokens

    def fingerprint(self, model: Forward, count: int | None = None) -> frozenset[int]:
        """What the text of the first `count` chunks is recognised by: see `gguforge.runtime.overlap`."""
        return fingerprint(model.detokenize(self.chunks[:count].reshape(-1)))


def read_text(model: Forward, path: str | os.PathLike[str], limit: int | None = None, skip: int = 0) -> Text:
    """Read a text file and cut it into chunks.

    Args:
        model: has the tokenizer and the size of a chunk.
        path: plain text; or conversations, when the name ends in `.jsonl`.
        limit: chunks to take at most.
        skip: chunks to leave out before them.

    Raises:
        InputError: the text is shorter than one chunk, or a line is no conversation.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if Path(path).suffix == CONVERSATIONS_SUFFIX:
        tokens = _conversations(model, data, path)
    else:
        tokens = model.tokenize(data.removesuffix(b"\n"))  # as llama.cpp's -f
    count = len(tokens) // model.chunk - skip
    if count <= 0:
        raise InputError(
            "the text is too short", path=path, expected=f"at least {(skip + 1) * model.chunk} tokens",
            found=len(tokens), remedy="Give a longer text, or a smaller --context.",
        )  # fmt: skip
    count = min(count, limit or count)
    chunks = tokens[skip * model.chunk : (skip + count) * model.chunk].reshape(count, model.chunk)
    return Text(os.fspath(path), hashlib.sha256(data).hexdigest(), chunks)


def _conversations(model: Forward, data: bytes, path: str | os.PathLike[str]) -> Tokens:
    """The conversations one behind the other; nothing inside a message acts as a control token."""
    vocabulary = Vocabulary(model.model)
    prompter = Prompter(vocabulary, model.file.metadata)
    if prompter.template is None:
        raise InputError(
            "the model has no chat template", path=model.file.path, remedy="Give plain text instead of .jsonl."
        )
    dangerous = "".join(sorted(set("".join(vocabulary.specials))))
    tokens: list[int] = []
    for number, messages in _lines(data, path):
        stand_ins = StandIns(dangerous)
        hidden = [message | {"content": stand_ins.hide(message["content"])} for message in messages]
        try:
            marked = prompter.template.render(hidden, answer=False)
        except TemplateFailure as error:
            raise InputError(f"line {number}: {error.what}", path=path) from error
        tokens += vocabulary.with_bos(vocabulary.tokenize_marked(marked, stand_ins.plain))
    return np.array(tokens, np.int32)


def _lines(data: bytes, path: str | os.PathLike[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Line numbers and messages; a line is a list of messages or an object that has one under `messages`."""
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        messages = conversation(read_line(line))
        if messages is None:
            raise InputError(
                f"line {number} is no conversation", path=path,
                expected='{"messages": [{"role": "user", "content": "..."}, ...]}',
            )  # fmt: skip
        yield number, messages


def read_line(line: bytes) -> Any:
    """The JSON value in a line; None when it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def conversation(found: Any) -> list[dict[str, Any]] | None:
    """The messages of a JSON value: a list of them, or an object with one under `messages`; None if it is neither."""
    messages = found.get("messages") if isinstance(found, dict) else found
    sound = isinstance(messages, list) and messages and all(map(_is_message, messages))
    return messages if sound else None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
