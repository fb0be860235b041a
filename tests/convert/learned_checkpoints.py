"""Tiny GPT-2 checkpoints for the golden tests, made like those of checkpoints.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints import TOKENIZERS, VOCAB, Case, like

Shapes = dict[str, tuple[int, ...]]
END = "<|endoftext|>"

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": VOCAB,
    "n_ctx": 96,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 96,
    "layer_norm_epsilon": 1e-05,
    "bos_token_id": 296,
    "eos_token_id": 296,
}
GPT2_K = like(GPT2, n_embd=256)


def gpt2_tensors(config: Mapping[str, Any] = GPT2, prefix: str = "transformer.", masks: bool = False) -> Shapes:
    """Every tensor of a GPT-2; with the constants that old checkpoints hold, if asked."""
    hidden, context = config["n_embd"], config["n_positions"]
    table: Shapes = {"wte.weight": (config["vocab_size"], hidden), "wpe.weight": (context, hidden)}
    table |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
    for i in range(config["n_layer"]):
        layers = {"attn.c_attn": 3 * hidden, "attn.c_proj": hidden, "mlp.c_fc": 4 * hidden, "mlp.c_proj": hidden}
        for name, width in layers.items():
            inputs = 4 * hidden if name == "mlp.c_proj" else hidden
            table |= {f"h.{i}.{name}.weight": (inputs, width), f"h.{i}.{name}.bias": (width,)}
        table |= {f"h.{i}.{name}.{part}": (hidden,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
        if masks:
            table |= {f"h.{i}.attn.bias": (1, 1, context, context), f"h.{i}.attn.masked_bias": (1,)}
    return {prefix + name: shape for name, shape in table.items()}


def vocabulary_files() -> dict[str, Any]:
    """vocab.json and merges.txt, and None for the tokenizer.json that holds the same."""
    tokenizer = TOKENIZERS["byte_level"](Case(GPT2, pre="gpt-2"))["tokenizer.json"]
    model = tokenizer["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    vocabulary = model["vocab"] | {END: len(model["vocab"])}
    return {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\n" + merges}


def gpt2(config: Mapping[str, Any] = GPT2, **changes: Any) -> Case:
    """A GPT-2 with a tokenizer.json."""
    return Case(config, pre="gpt-2", **{"tokenizer": "byte_level", "tensors": gpt2_tensors(config), **changes})


UNTIED = like(GPT2, tie_word_embeddings=False)
FILES = Case(GPT2, "none", pre="gpt-2", tensors=gpt2_tensors(), files=vocabulary_files())
CASES: dict[str, Case] = {
    "gpt2": gpt2(),
    "gpt2-no-prefix": gpt2(tensors=gpt2_tensors(prefix="")),
    "gpt2-f32-to-f16": gpt2(dtype="F32", type="F16"),
    "gpt2-f16-to-f32": gpt2(dtype="F16", type="F32"),
    "gpt2-untied": gpt2(UNTIED, extra={"lm_head.weight": (VOCAB, 64)}),
    "gpt2-sharded": gpt2(shards=3),
    "gpt2-larger-vocabulary": gpt2(like(GPT2, vocab_size=352)),
    "gpt2-vocabulary-files": FILES,
    "gpt2-vocabulary-files-named": Case(
        GPT2, "none", pre="gpt-2", tensors=gpt2_tensors(),
        files=vocabulary_files() | {
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>", "model_max_length": 96},
            "added_tokens.json": {"<end>": 297, "<extra>": 298},
        },
    ),
}  # fmt: skip
