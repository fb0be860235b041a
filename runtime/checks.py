"""What a file must be before llama.cpp sees it: a failed assertion there ends the process without a word to the user.

The layout itself is the strict reader's business (`quant.reader`, `quant.splits`); sizes that do not fit each other
llama.cpp refuses politely. Limits: llama.cpp, src/llama-hparams.h (LLAMA_MAX_LAYERS), ggml/src/ggml-cpu/ops.cpp (eps).
"""

from __future__ import annotations

import math

from gguforge.quant.errors import EngineError, GGUFError
from gguforge.quant.reader import GGUFFile

_MAX_LAYERS = 512


def check_runnable(file: GGUFFile) -> None:
    """Refuse what llama.cpp would abort the whole process on.

    Raises:
        GGUFError: there are no weights, a number is out of range, or the tokenizer's lists do not match.
    """
    if not file.tensors:
        raise GGUFError("holds no weights, only a vocabulary or metadata", path=file.path)
    _check_numbers(file)
    _check_tokenizer(file)


def check_continues(file: GGUFFile) -> None:
    """Refuse an encoder that llama.cpp takes for a decoder: BERT, whose attention goes in both directions.

    Raises:
        EngineError: it is one.
    """
    architecture = file.metadata.get("general.architecture")
    causal = None if architecture is None else file.metadata.get(f"{architecture.value}.attention.causal")
    if causal is not None and causal.value is False:
        raise EngineError("is not a model that continues text (an encoder, for embeddings)", path=file.path)


def _check_tokenizer(file: GGUFFile) -> None:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise GGUFError("has no tokenizer", path=file.path, expected="the metadata key tokenizer.ggml.tokens")
    if not isinstance(tokens.value, list) or not all(isinstance(text, str) for text in tokens.value):
        raise GGUFError("tokenizer.ggml.tokens is not a list of strings", path=file.path)
    for name, kind in (("scores", float), ("token_type", int)):
        entry = file.metadata.get(f"tokenizer.ggml.{name}")
        if entry is None:
            continue
        if not isinstance(entry.value, list) or not all(type(item) is kind for item in entry.value):
            raise GGUFError(f"tokenizer.ggml.{name} is not a list of {kind.__name__}", path=file.path)
        if len(entry.value) != len(tokens.value):
            wanted, got = len(tokens.value), len(entry.value)
            raise GGUFError(
                f"tokenizer.ggml.{name} does not fit the tokens", path=file.path, expected=wanted, found=got
            )


def _check_numbers(file: GGUFFile) -> None:
    for key, entry in file.metadata.items():
        value = entry.value
        if isinstance(value, float) and not math.isfinite(value):
            raise GGUFError(f"metadata key {key} is not a finite number", path=file.path, found=value)
        if key.endswith("_epsilon") and isinstance(value, float) and value < 0:
            raise GGUFError(f"metadata key {key} is negative", path=file.path, found=value)
        if key.endswith(".block_count") and (not isinstance(value, int) or not 1 <= value <= _MAX_LAYERS):
            raise GGUFError(
                f"metadata key {key} is out of range", path=file.path, expected=f"1 to {_MAX_LAYERS}", found=value
            )
