"""The calibration text of a tuned model: its chunks, and what the model's metadata say of it."""

from __future__ import annotations

import os
from pathlib import Path

from gguforge.quant.metadata import Value, string, uint32
from gguforge.runtime.chunks import read_text
from gguforge.runtime.forward import BATCH, Forward, Tokens
from gguforge.runtime.overlap import MODEL_PREFIX


def tuning_chunks(model: str | os.PathLike[str], text: str | os.PathLike[str], limit: int | None = None) -> Tokens:
    """Read a text as the model's tokens, in chunks of 512.

    Args:
        model: a GGUF file that llama.cpp runs; of a split model, the first part.
        text: plain text, or conversations in a .jsonl file.
        limit: chunks to take at most, spread over the whole text.

    Returns:
        shape (chunks, tokens of a chunk), the first of each the token that begins texts, where the model has one.

    Raises:
        GGUForgeError: the model cannot be run, the text is too short.
        OSError: one of them cannot be read.
    """
    with Forward.open(model, chunk=BATCH, outputs=1) as forward:
        chunks = read_text(forward, text).chunks
        step = max(1, len(chunks) // limit) if limit else 1
        found = chunks[::step][:limit].copy()
        if forward.bos is not None:
            found[:, 0] = forward.bos
    return found


def tuning_metadata(text: str | os.PathLike[str], chunks: int) -> dict[str, Value]:
    """The keys by which `gguforge evaluate` warns of a text that the model was tuned on."""
    return {
        MODEL_PREFIX + "dataset": string(Path(text).name),
        MODEL_PREFIX + "chunks_count": uint32(chunks),
    }
