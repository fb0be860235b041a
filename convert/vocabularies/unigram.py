"""Unigram vocabularies, XLM-RoBERTa's kind: sentencepiece.bpe.model, or tokenizer.json alone.

Despite its name the model is no BPE. transformers puts four special tokens of its own before its pieces.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from gguforge.convert.checkpoint import Checkpoint, inside
from gguforge.convert.json_file import TOKENIZER_LIMIT, Json, objects
from gguforge.convert.vocabularies.protobuf import Normalizer, read_normalizer
from gguforge.convert.vocabularies.sentencepiece import read_pieces
from gguforge.convert.vocabularies.special import content
from gguforge.convert.vocabularies.tables import SPECIAL_NAMES, added_tokens_of, checked_model
from gguforge.convert.vocabularies.tokens import Kind, Token, padding, single, token_metadata
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, array, boolean, uint32

MODEL_NAME, FILE_NAME = "sentencepiece.bpe.model", "tokenizer.json"
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
"""The tokens that transformers has in the place of the model's three."""

SURROUNDS = {
    "added_tokens": [{"id": i, "content": text} for i, text in enumerate(FIRST)],
    "post_processor": {"type": "RobertaProcessing"},
}
"""What a tokenizer.json would say of the tokens around a text."""


@dataclass(frozen=True)
class Unigram:
    """A Unigram tokenizer.

    Attributes:
        json: tokenizer.json, or what it would say of special tokens.
        tokens: the whole vocabulary.
        normalizer: what is done to a text first.
    """

    json: Json
    tokens: list[Token]
    normalizer: Normalizer

    def metadata(self, token_types: int) -> dict[str, Value]:
        """The vocabulary itself, in file order."""
        pairs = token_metadata("t5", "default", self.tokens, scored=True)
        pairs["tokenizer.ggml.add_space_prefix"] = boolean(self.normalizer.add_prefix)
        pairs["tokenizer.ggml.token_type_count"] = uint32(token_types)
        pairs["tokenizer.ggml.remove_extra_whitespaces"] = boolean(self.normalizer.remove_spaces)
        if self.normalizer.charsmap:
            pairs["tokenizer.ggml.precompiled_charsmap"] = array(GGUFValueType.UINT8, list(self.normalizer.charsmap))
        return pairs


def read_unigram(checkpoint: Checkpoint, vocab_size: int) -> Unigram:
    """Read the tokenizer, padded to `vocab_size`.

    Raises:
        CheckpointError: there is none, it is damaged or of another kind, or has ids beyond `vocab_size`.
    """
    if checkpoint.has(MODEL_NAME):
        return _read_model(checkpoint, vocab_size)
    if checkpoint.has(FILE_NAME):
        return _read_json(checkpoint, vocab_size)
    remedy = f"Add {FILE_NAME} or {MODEL_NAME}."
    raise CheckpointError("there is no tokenizer that can be read", path=checkpoint.folder, remedy=remedy)


def _read_model(checkpoint: Checkpoint, vocab_size: int) -> Unigram:
    path = inside(checkpoint.folder, MODEL_NAME)
    pieces = read_pieces(path)
    try:
        normalizer = read_normalizer(path.read_bytes())
    except ValueError as error:
        raise CheckpointError("this is no sentencepiece model", path=path, found=str(error)) from None
    if not normalizer.unigram:
        raise CheckpointError("the sentencepiece model is of another kind", path=path, expected="Unigram")
    _check_size(len(pieces), vocab_size, path)
    padded = pieces + [padding(i) for i in range(len(pieces), vocab_size)]
    first = [Token(text, Kind.UNKNOWN if text == "<unk>" else Kind.CONTROL) for text in FIRST]
    tokenizer = checkpoint.object(FILE_NAME, TOKENIZER_LIMIT) or dict(SURROUNDS)
    return Unigram(tokenizer, (first + padded[3:-1])[:vocab_size], normalizer)


def _check_size(count: int, vocab_size: int, path: Path) -> None:
    if count > vocab_size:
        sides = {"expected": f"at most {vocab_size} (vocab_size of config.json)", "found": f"{count}"}
        raise CheckpointError("the tokenizer has more tokens than the model", path=path, **sides)


def _read_json(checkpoint: Checkpoint, vocab_size: int) -> Unigram:
    path = checkpoint.folder / FILE_NAME
    tokenizer = checkpoint.object(FILE_NAME, TOKENIZER_LIMIT)
    model = checked_model(tokenizer, "Unigram", path)
    pairs = model.pop("vocab", None)
    if not isinstance(pairs, list) or not all(map(_is_scored, pairs)):
        raise CheckpointError("vocab is no list of texts with scores", path=path)
    _check_size(len(pairs), vocab_size, path)
    config = checkpoint.object("tokenizer_config.json")
    vocabulary = {text: i for i, (text, _) in enumerate(pairs)}
    added = added_tokens_of(tokenizer, vocabulary, checkpoint)
    named = {content(config.get(name)) for name in SPECIAL_NAMES}
    unknown = vocabulary.get(content(config.get("unk_token")) or "", model.get("unk_id"))
    tokens = [padding(i) for i in range(vocab_size)]
    for i, (text, score) in enumerate(pairs):
        kind = Kind.UNKNOWN if i == unknown else Kind.CONTROL if text in named else Kind.NORMAL
        kind = Kind.USER_DEFINED if kind == Kind.NORMAL and i in added else kind
        tokens[i] = Token(text, kind, single(score))
    return Unigram(tokenizer, tokens, Normalizer(_charsmap(tokenizer.get("normalizer"), path), True, True, True))


def _is_scored(pair: object) -> bool:
    return (
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        and isinstance(pair[1], int | float) and abs(pair[1]) < 1e30
    )  # fmt: skip


def _charsmap(normalizer: object, path: Path) -> bytes:
    """The compiled table of replacements, wherever among the normalizers it stands."""
    if not isinstance(normalizer, dict):
        return b""
    if "precompiled_charsmap" in normalizer:
        try:
            return base64.b64decode(normalizer["precompiled_charsmap"] or "", validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise CheckpointError("precompiled_charsmap is no base64", path=path, found=str(error)) from None
    return next((found for part in objects(normalizer.get("normalizers")) if (found := _charsmap(part, path))), b"")
