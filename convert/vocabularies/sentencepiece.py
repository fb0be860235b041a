"""Vocabularies from a sentencepiece model, tokenizer.model, as llama.cpp's converter reads them.

Not carried over: the model's own text normalization (llama.cpp has none for this kind) and its user-defined pieces'
special status. A tokenizer.model that holds a tiktoken vocabulary (early Llama 3) is not sentencepiece.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguforge.convert.checkpoint import Checkpoint, inside
from gguforge.convert.json_file import Json
from gguforge.convert.vocabularies.tokens import ADDED_SCORE, Kind, Token, added, padding
from gguforge.quant.errors import CheckpointError

Warn = Callable[[str], None]

FILE_NAME = "tokenizer.model"
FILE_LIMIT = 64 << 20


def is_sentencepiece(checkpoint: Checkpoint) -> bool:
    """Whether the folder has a tokenizer.model that is a serialized protobuf: its first field is a piece."""
    if not checkpoint.has(FILE_NAME):
        return False
    with inside(checkpoint.folder, FILE_NAME).open("rb") as file:
        return file.read(1) == b"\x0a"


def sentencepiece_tokens(checkpoint: Checkpoint, vocab_size: int, warn: Warn) -> list[Token]:
    """The pieces of tokenizer.model with the tokens that were added to them, padded to `vocab_size`.

    Raises:
        CheckpointError: tokenizer.model is damaged.
    """
    tokens = [padding(i) for i in range(vocab_size)]
    pieces = read_pieces(inside(checkpoint.folder, FILE_NAME))
    tokens[: len(pieces)] = pieces[:vocab_size]
    if len(pieces) > vocab_size:
        warn(f"tokenizer.model: {len(pieces) - vocab_size} tokens are beyond vocab_size {vocab_size} and left out")
    for text, i in checkpoint.object("added_tokens.json").items():
        if _in_range(i, text, vocab_size, warn):
            tokens[i] = Token(text, Kind.USER_DEFINED, ADDED_SCORE)
    for i, text, special in added_tokens(checkpoint.object("tokenizer_config.json")):
        if _in_range(i, text, vocab_size, warn):
            tokens[i] = added(text, special)
    return tokens


def added_tokens(tokenizer_config: Json) -> list[tuple[int, str, bool]]:
    """Id, text and special flag of every entry of `added_tokens_decoder`."""
    decoder = tokenizer_config.get("added_tokens_decoder")
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return [
        (int(key), entry["content"], entry.get("special") is True)
        for key, entry in entries
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
    ]


def _in_range(i: object, text: str, vocab_size: int, warn: Warn) -> bool:
    if type(i) is int and 0 <= i < vocab_size:
        return True
    warn(f"added token {text[:40]!r} has id {i!r}, beyond vocab_size {vocab_size}; left out")
    return False


def read_pieces(path: Path) -> list[Token]:
    """The pieces of a sentencepiece model, with their kinds and scores.

    Raises:
        CheckpointError: it is damaged.
    """
    from sentencepiece import SentencePieceProcessor

    if path.stat().st_size > FILE_LIMIT:
        raise CheckpointError("file is too large", path=path, expected=f"at most {FILE_LIMIT} bytes")
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
        return _pieces(model)
    except (RuntimeError, OSError, UnicodeDecodeError):
        raise CheckpointError("this is no sentencepiece model", path=path, remedy="Download it again.") from None


def _pieces(model: Any) -> list[Token]:
    ids = list(range(model.vocab_size()))
    flags = zip(model.IsUnknown(ids), model.IsControl(ids), model.IsUnused(ids), model.IsByte(ids), strict=True)
    pieces = zip(model.IdToPiece(ids), model.GetScore(ids), flags, strict=True)
    return [Token(text, _kind(*kinds), score) for text, score, kinds in pieces]


def _kind(unknown: bool, control: bool, unused: bool, byte: bool) -> Kind:
    if unknown:
        return Kind.UNKNOWN
    if control:
        return Kind.CONTROL
    return Kind.UNUSED if unused else Kind.BYTE if byte else Kind.NORMAL
