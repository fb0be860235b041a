"""Vocabularies from tokenizer.json with a BPE model: the byte-level kind and the byte-fallback kind.

The byte-level kind (GPT-2's, Llama 3's, Qwen's) keeps its merges. The byte-fallback kind (Llama 2's, Mistral's) is a
sentencepiece vocabulary in other clothes: llama.cpp merges it by scores, so each token gets the rank of its merge as
score.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import TOKENIZER_LIMIT, Json
from gguforge.convert.vocabularies.tables import (
    AddedToken,
    added_tokens_of,
    base_tokens,
    checked_model,
    checked_vocabulary,
)
from gguforge.convert.vocabularies.tokens import Kind, Token, added, looks_special
from gguforge.quant.errors import CheckpointError

FILE_NAME = "tokenizer.json"
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class BPE:
    """tokenizer.json, checked.

    Attributes:
        json: the file without the two long lists below.
        vocabulary: id by text.
        merges: best first, each two texts with a space between, or a list of two texts.
        added: by id, tokenizer_config.json's included.
    """

    json: Json
    vocabulary: dict[str, int]
    merges: list[Any]
    added: dict[int, AddedToken]

    @property
    def is_byte_fallback(self) -> bool:
        """Whether unknown characters are spelled in <0x..> pieces, as in sentencepiece."""
        decoder = self.json.get("decoder")
        kind = decoder.get("type") if isinstance(decoder, dict) else None
        return self.json["model"].get("byte_fallback") is True and kind == "Sequence"

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The merges as pairs, one at a time: there are hundreds of thousands."""
        return (pair for merge in self.merges if (pair := _pair(merge)) is not None)


def read_bpe(checkpoint: Checkpoint) -> BPE:
    """Read tokenizer.json and what tokenizer_config.json adds to it.

    Raises:
        CheckpointError: it is damaged, or its model is not BPE.
    """
    path = checkpoint.folder / FILE_NAME
    tokenizer = checkpoint.object(FILE_NAME, TOKENIZER_LIMIT)
    model = checked_model(tokenizer, "BPE", path, default="BPE")
    vocabulary = checked_vocabulary(model.pop("vocab", None), path)
    merges = checked_merges(model.pop("merges", None) or [], path)
    return BPE(tokenizer, vocabulary, merges, added_tokens_of(tokenizer, vocabulary, checkpoint))


def checked_merges(merges: object, path: Path) -> list[Any]:
    """A list of pairs of texts.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(merges, list):
        raise CheckpointError("merges are no list", path=path)
    odd = next((merge for merge in merges if _pair(merge) is None), None)
    if odd is not None or None in merges:
        raise CheckpointError("a merge is no pair of texts", path=path, found=repr(odd)[:60])
    return merges


def _pair(merge: object) -> tuple[str, str] | None:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], str):
        return parts[0], parts[1]
    return None


def byte_level_tokens(bpe: BPE, vocab_size: int, checkpoint: Checkpoint) -> list[Token]:
    """The vocabulary of the byte-level kind, padded to `vocab_size`.

    Raises:
        CheckpointError: the tokenizer has ids beyond `vocab_size`.
    """
    tokens = base_tokens(bpe.vocabulary, bpe.added, vocab_size, checkpoint.folder / FILE_NAME)
    for i, token in bpe.added.items():
        text = token.text if token.normalized else decoded(token.text)
        if token.special or looks_special(text):
            tokens[i] = Token(text, Kind.CONTROL)
        else:
            tokens[i] = added(text, special=False)
    return tokens


def byte_fallback_tokens(bpe: BPE, vocab_size: int, checkpoint: Checkpoint) -> list[Token]:
    """The vocabulary of the byte-fallback kind, padded to `vocab_size`, with scores.

    Raises:
        CheckpointError: the tokenizer has ids beyond `vocab_size`.
    """
    tokens = base_tokens(bpe.vocabulary, bpe.added, vocab_size, checkpoint.folder / FILE_NAME)
    scores = merge_scores(bpe.pairs())
    unknown = bpe.json["model"].get("unk_token")
    for text, i in bpe.vocabulary.items():
        kind = Kind.BYTE if BYTE_PIECE.fullmatch(text) else Kind.UNKNOWN if text == unknown else Kind.NORMAL
        tokens[i] = Token(text, kind, scores.get(text, 0.0 if kind != Kind.NORMAL else -float(len(scores))))
    for i, token in bpe.added.items():
        tokens[i] = added(token.text, token.special)
    return tokens


def merge_scores(merges: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Scores under which sentencepiece's algorithm merges as BPE does: minus the order in which tokens first appear.

    >>> merge_scores([("a", "b"), ("c", "d"), ("ab", "c"), ("a", "bc")])
    {'ab': 0.0, 'cd': -1.0, 'abc': -2.0}
    """
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, float(-len(scores)))
    return scores


def written_merges(bpe: BPE) -> list[str]:
    """Merges as GGUF holds them: two texts with a space between; spaces inside them as GPT-2's byte map writes them.

    >>> written_merges(BPE({}, {}, ["\u0120 t", [" ", "x"]], {}))
    ['Ġ t', 'Ġ x']
    """
    space = "\u0120"
    return [
        merge if isinstance(merge, str) else f"{merge[0].replace(' ', space)} {merge[1].replace(' ', space)}"
        for merge in bpe.merges
    ]


def byte_characters() -> dict[str, int]:
    """GPT-2's byte map: the printable character that stands for each byte.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py

    >>> table = byte_characters()
    >>> table["A"], table["\u0120"], len(table)
    (65, 32, 256)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def decoded(text: str) -> str:
    """An added token as the byte-level decoder gives it back; a text outside the byte map stays as it is.

    >>> decoded("<|im_end|>"), decoded("\u0120hi"), decoded("a b")
    ('<|im_end|>', ' hi', 'a b')
    """
    if text.isascii():
        return text
    table = byte_characters()
    if not all(c in table for c in text):
        return text
    return bytes(table[c] for c in text).decode("utf-8", "replace")
