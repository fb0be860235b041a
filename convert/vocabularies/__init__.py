"""Vocabularies: the tokenizer's metadata, from tokenizer.model or tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable

from gguforge.convert.checkpoint import Checkpoint
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
from gguforge.convert.vocabularies.special import chat_templates, special_metadata
from gguforge.convert.vocabularies.tokens import token_metadata
from gguforge.convert.vocabularies.vocab_files import has_vocabulary_files, read_vocabulary_files
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, array, boolean

Warn = Callable[[str], None]


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
    if "sentencepiece" in kinds and is_sentencepiece(checkpoint):
        tokens = sentencepiece_tokens(checkpoint, vocab_size, warn)
        tokenizer = checkpoint.object(FILE_NAME, 256 << 20)
        pairs = token_metadata("llama", "default", tokens, scored=True)
        normal: dict[str, bool] = normalizer_metadata(tokenizer, _ignore)
    elif checkpoint.has(FILE_NAME):
        bpe = read_bpe(checkpoint)
        tokenizer = bpe.json
        if bpe.is_byte_fallback and "byte_fallback" in kinds:
            tokens = byte_fallback_tokens(bpe, vocab_size, checkpoint)
            pairs = token_metadata("llama", "default", tokens, scored=True)
        else:
            pairs = _byte_level(bpe, vocab_size, checkpoint, pre or _pretokenizer(bpe, checkpoint))
        normal = normalizer_metadata(tokenizer, warn)
    elif has_vocabulary_files(checkpoint):
        bpe, name = read_vocabulary_files(checkpoint)
        tokenizer, normal = {}, {}
        pairs = _byte_level(bpe, vocab_size, checkpoint, pre or name)
    else:
        remedy = "Add tokenizer.json, tokenizer.model (sentencepiece), or vocab.json with merges.txt."
        raise CheckpointError("there is no tokenizer that can be read", path=checkpoint.folder, remedy=remedy)
    pairs |= special_metadata(checkpoint, tokenizer, vocab_size, warn)
    pairs |= chat_templates(checkpoint, warn)
    return pairs | {f"tokenizer.ggml.normalizer.{key}": boolean(flag) for key, flag in normal.items()}


def _ignore(line: str) -> None:
    """For what the sentencepiece model beside tokenizer.json settles."""


def _pretokenizer(bpe: BPE, checkpoint: Checkpoint) -> str:
    tidies = checkpoint.object("tokenizer_config.json").get("clean_up_tokenization_spaces") is True
    return find_pretokenizer(bpe.json, tidies, checkpoint.folder / FILE_NAME)


def _byte_level(bpe: BPE, vocab_size: int, checkpoint: Checkpoint, pre: str) -> dict[str, Value]:
    tokens = byte_level_tokens(bpe, vocab_size, checkpoint)
    merges = array(GGUFValueType.STRING, written_merges(bpe))
    return token_metadata("gpt2", pre, tokens, scored=False) | {"tokenizer.ggml.merges": merges}
