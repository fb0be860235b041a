"""What an encoder's GGUF file is worth: its embeddings of held-out texts, by llama.cpp, beside those of other files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.distill.batches import ALL_TEXT
from gguforge.distill.data import read_corpus
from gguforge.distill.encoders.measure import Array, compared
from gguforge.distill.encoders.text import texts_of
from gguforge.runtime.embedding import Embedder


def evaluate_embeddings(
    model: Path,
    paths: Sequence[Path],
    against: Mapping[str, Path],
    context: int,
    limit: int,
    threads: int | None,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """A file's embeddings of texts and those of other files of the same tokenizer.

    Args:
        paths: every line is a text, and every {"text": "..."} of a .jsonl file.
        against: what to compare with, by name.
        limit: take so many texts at most, evenly from the whole.
        progress: called with the texts that are done, and how many there are.

    Returns:
        For each name the mean cosine (None where widths differ) and the rank correlation of the texts' similarities.

    Raises:
        GGUForgeError: a file cannot be used.
    """
    texts = some_texts(paths, context, limit)
    total, done = (1 + len(against)) * len(texts), 0

    def embedded(path: Path) -> Array:
        nonlocal done
        found = []
        with Embedder.open(path, context=context, threads=threads) as embedder:
            for text in texts:
                found.append(embedder.embed(text))
                done += 1
                progress(done, total)
        return np.stack(found)

    ours = embedded(model)
    found = {name: compared(ours, embedded(path)) for name, path in against.items()}
    known = {
        name: {key: None if math.isnan(value) else value for key, value in pair.items()} for name, pair in found.items()
    }
    parts = [
        f"{label} {name} {values[key]:.5f}"
        for name, values in known.items()
        for key, label in (("cosine", "cosine to"), ("rank_correlation", "rank correlation with"))
        if values[key] is not None
    ]
    line = "; ".join(parts) or f"{len(texts)} texts embedded"
    return {"text": ", ".join(path.name for path in paths), "texts": len(texts), "against": known, "line": line}


def some_texts(paths: Sequence[Path], context: int, limit: int) -> list[str]:
    """At most `limit` texts, spread over all; blank ones are left out."""
    shards = read_corpus(paths, context, ALL_TEXT).shards
    found = [text for shard in shards for passage in shard for text in texts_of(passage, True) if text.strip()]
    if len(found) <= limit:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]
