"""The calibration text of a tuned model: its chunks, and what the model's metadata say of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gguforge.quant.constants import Keys, TokenType
from gguforge.quant.metadata import Value, string, uint32
from gguforge.runtime.chunks import read_text
from gguforge.runtime.forward import BATCH, Forward, Tokens
from gguforge.runtime.overlap import MODEL_PREFIX

RANDOM_CHUNKS = 8
PROOF, MOST_PROOF = 16, 8  # one chunk of so many, and no more in all, are kept from tuning, for measuring the result


def tuning_chunks(model: str | os.PathLike[str], text: str | os.PathLike[str], limit: int | None = None) -> Tokens:
    """Read a text as the model's tokens, in chunks of 512.

    Args:
        model: a GGUF file that llama.cpp runs; of a split model, the first part.
        text: plain text, or conversations in a .jsonl file.
        limit: chunks to take at most, spread over the whole text.

    Returns:
        shape (chunks, tokens of a chunk), the first of each the token that begins texts, where the model has one. What
        `proof_chunks` tells is not among them.

    Raises:
        GGUForgeError: the model cannot be run, the text is too short.
        OSError: one of them cannot be read.
    """
    with Forward.open(model, chunk=BATCH, outputs=1) as forward:
        chunks = read_text(forward, text).chunks
        chunks = chunks[: len(chunks) - _kept_back(len(chunks))]
        step = max(1, len(chunks) // limit) if limit else 1
        found = chunks[::step][:limit].copy()
        if forward.bos is not None:
            found[:, 0] = forward.bos
    return found


def proof_chunks(model: str | os.PathLike[str], text: str | os.PathLike[str]) -> tuple[int, int]:
    """Where the chunks begin that are kept from tuning, at the end of a text, and how many they are; short texts have
    none."""
    with Forward.open(model, chunk=BATCH, outputs=1) as forward:
        total = len(read_text(forward, text).chunks)
    return total - _kept_back(total), _kept_back(total)


def _kept_back(chunks: int) -> int:
    return min(MOST_PROOF, chunks // PROOF)


def random_chunks(model: str | os.PathLike[str]) -> Tokens:
    """Words of the model's vocabulary in no order, for models that are tuned without a text: always the same ones.

    Returns:
        shape (RANDOM_CHUNKS, 512), the first of each the token that begins texts, where the model has one.

    Raises:
        GGUForgeError: the model cannot be run.
    """
    with Forward.open(model, chunk=BATCH, outputs=1) as forward:
        types = forward.file.metadata.get(Keys.Tokenizer.TOKEN_TYPE)
        kinds = np.asarray(types.value) if types is not None else np.ones(forward.vocabulary_size)
        words = np.flatnonzero(kinds[: forward.vocabulary_size] == TokenType.NORMAL)
        drawn = np.random.PCG64(0).random_raw((RANDOM_CHUNKS, BATCH)) % np.uint64(max(1, len(words)))
        found: Tokens = (words if len(words) else np.zeros(1, np.int64))[drawn].astype(np.int32)
        if forward.bos is not None:
            found[:, 0] = forward.bos
    return found


def tuning_metadata(text: str | os.PathLike[str], chunks: int) -> dict[str, Value]:
    """The keys by which `gguforge evaluate` warns of a text that the model was tuned on."""
    return {
        MODEL_PREFIX + "dataset": string(Path(text).name),
        MODEL_PREFIX + "chunks_count": uint32(chunks),
    }
