"""Answers of a converted file, straight from llama.cpp's C interface: token ids, scores, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int32
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from gguforge.runtime.library import library, load_model


@contextmanager
def opened(path: Path, vocab_only: bool = False) -> Iterator[Any]:
    library()
    model = load_model(path, vocab_only=vocab_only)
    try:
        yield model
    finally:
        llama.llama_model_free(model)


def tokens_of(model: Any, text: str, special: bool = True) -> list[int]:
    """The ids of a text, with the tokens that the file puts around it."""
    data = text.encode()
    ids = (c_int32 * (2 * len(data) + 8))()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), data, len(data), ids, len(ids), special, True)
    assert count >= 0
    return list(ids[:count])


def run(model: Any, tokens: Sequence[int], embeddings: bool) -> np.ndarray:
    """Scores of every position, shape (tokens, vocabulary), or the embedding of every token or of the whole text."""
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(32, len(tokens))
    params.n_threads = params.n_threads_batch = 1
    params.embeddings = embeddings
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert llama.llama_decode(context, batch) == 0
        if not embeddings:
            width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
            return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), width)).copy()
        width = llama.llama_model_n_embd(model)
        if llama.llama_pooling_type(context) == llama.LLAMA_POOLING_TYPE_NONE:
            return np.ctypeslib.as_array(llama.llama_get_embeddings(context), (len(tokens), width)).copy()
        return np.ctypeslib.as_array(llama.llama_get_embeddings_seq(context, 0), (1, width)).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)


def published(stem: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids from llama.cpp's own test vectors, `stem`.inp and `stem`.out."""
    texts = Path(f"{stem}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{stem}.out").read_text("utf-8").splitlines()
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines, strict=True)]
