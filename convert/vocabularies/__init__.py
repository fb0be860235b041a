"""Vocabularies: the tokenizer's metadata, from whichever files hold the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import TOKENIZER_LIMIT, Json
from gguforge.convert.vocabularies.bpe import (
    BPE,
    FILE_NAME,
    byte_fallback_tokens,
    byte_level_tokens,
    read_bpe,
    written_merges,
)
from gguforge.convert.vocabularies.pretokenizers import NAMES, find_pretokenizer, normalizer_metadata
from gguforge.convert.vocabularies.sentencepiece import is_sentencepiece, sentencepiece_tokens
from gguforge.convert.vocabularies.special import ID_KEYS, chat_templates, special_metadata
from gguforge.convert.vocabularies.tokens import token_metadata
from gguforge.convert.vocabularies.unigram import read_unigram
from gguforge.convert.vocabularies.vocab_files import has_vocabulary_files, read_vocabulary_files
from gguforge.convert.vocabularies.wordpiece import read_wordpiece, wordpiece_tokens
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, array, boolean, uint32

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as it was found.

    Attributes:
        pairs: metadata of the vocabulary itself, in file order.
        tokenizer: tokenizer.json, for what it says of special tokens; {} if there is none.
        normalizer: what is done to a text first, by llama.cpp's names.
        ids: special tokens by role that no other file tells.
    """

    pairs: dict[str, Value]
    tokenizer: Json = field(default_factory=dict)
    normalizer: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)


def tokenizer_metadata(
    checkpoint: Checkpoint, vocab_size: int, kinds: tuple[str, ...], pre: str | None, warn: Warn
) -> dict[str, Value]:
    """Everything under `tokenizer.`, in file order.

    Args:
        checkpoint: holds the tokenizer.
        vocab_size: rows of the embedding; the vocabulary is padded to it.
        kinds: the kinds of tokenizer that the architecture may have.
        pre: overrides the name of the pre-tokenizer of a byte-level vocabulary.
        warn: receives one line for each thing that cannot be used.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged or not understood.
    """
    if pre is not None and pre not in NAMES:
        raise CheckpointError(f"--pre {pre!r} is not known", remedy=f"Known: {', '.join(sorted(NAMES))}.")
    found = _find(checkpoint, vocab_size, kinds, pre, warn)
    pairs = found.pairs | special_metadata(checkpoint, found.tokenizer, vocab_size, warn)
    told = {f"tokenizer.ggml.{ID_KEYS[role]}": uint32(i) for role, i in found.ids.items()}
    pairs = pairs | {key: value for key, value in told.items() if key not in pairs}
    pairs |= chat_templates(checkpoint, warn)
    return pairs | {f"tokenizer.ggml.normalizer.{key}": boolean(flag) for key, flag in found.normalizer.items()}


def _find(checkpoint: Checkpoint, vocab_size: int, kinds: tuple[str, ...], pre: str | None, warn: Warn) -> Vocabulary:
    if "wordpiece" in kinds:
        return _wordpiece(checkpoint, vocab_size, pre, warn)
    if "unigram" in kinds:
        unigram = read_unigram(checkpoint, vocab_size)
        return Vocabulary(unigram.metadata(_token_types(checkpoint)), unigram.json)
    if "sentencepiece" in kinds and is_sentencepiece(checkpoint):
        tokens = sentencepiece_tokens(checkpoint, vocab_size, warn)
        tokenizer = checkpoint.object(FILE_NAME, TOKENIZER_LIMIT)
        normalizer = normalizer_metadata(tokenizer, _ignore)
        return Vocabulary(token_metadata("llama", "default", tokens, scored=True), tokenizer, normalizer)
    if checkpoint.has(FILE_NAME):
        return _tokenizer_json(checkpoint, vocab_size, kinds, pre, warn)
    if has_vocabulary_files(checkpoint):
        bpe, name = read_vocabulary_files(checkpoint)
        return Vocabulary(_byte_level(bpe, vocab_size, checkpoint, pre or name), bpe.json)
    remedy = "Add tokenizer.json, tokenizer.model (sentencepiece), or vocab.json with merges.txt."
    raise CheckpointError("there is no tokenizer that can be read", path=checkpoint.folder, remedy=remedy)


def _token_types(checkpoint: Checkpoint) -> int:
    """XLM-RoBERTa's, which stands among the tokenizer's metadata."""
    found = checkpoint.config.get("type_vocab_size", 2)
    if type(found) is not int or not 0 < found < 1 << 31:
        sides = {"expected": "a whole number from 1", "found": repr(found)[:60]}
        raise CheckpointError("field 'type_vocab_size' cannot be used", path=checkpoint.folder / "config.json", **sides)
    return found


def _ignore(line: str) -> None:
    """For what the sentencepiece model beside tokenizer.json settles."""


def _tokenizer_json(
    checkpoint: Checkpoint, vocab_size: int, kinds: tuple[str, ...], pre: str | None, warn: Warn
) -> Vocabulary:
    bpe = read_bpe(checkpoint)
    if bpe.is_byte_fallback and "byte_fallback" in kinds:
        pairs = token_metadata("llama", "default", byte_fallback_tokens(bpe, vocab_size, checkpoint), scored=True)
    else:
        tidies = checkpoint.object("tokenizer_config.json").get("clean_up_tokenization_spaces") is True
        name = pre or find_pretokenizer(bpe.json, tidies, checkpoint.folder / FILE_NAME)
        pairs = _byte_level(bpe, vocab_size, checkpoint, name)
    return Vocabulary(pairs, bpe.json, normalizer_metadata(bpe.json, warn))


def _byte_level(bpe: BPE, vocab_size: int, checkpoint: Checkpoint, pre: str) -> dict[str, Value]:
    tokens = byte_level_tokens(bpe, vocab_size, checkpoint)
    merges = array(GGUFValueType.STRING, written_merges(bpe))
    return token_metadata("gpt2", pre, tokens, scored=False) | {"tokenizer.ggml.merges": merges}


def _wordpiece(checkpoint: Checkpoint, vocab_size: int, pre: str | None, warn: Warn) -> Vocabulary:
    read = read_wordpiece(checkpoint)
    pairs = token_metadata("bert", pre or read.pre, wordpiece_tokens(read, vocab_size), scored=False)
    normalizer = normalizer_metadata(read.json, warn) if read.json else read.unusual_normalizer(checkpoint)
    return Vocabulary(pairs, read.json, normalizer, read.unusual_ids(checkpoint))
