"""Writes a Llama of 2 or 3 blocks, 256 wide, whose matrices take k-quants, and texts to read through it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_model import vocabulary

from gguforge.quant.constants import GGMLQuantizationType, GGUFValueType
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write

WIDTH, HEADS, INNER = 256, 4, 256
WORDS = ("hello", "user,", "a", "list.", "he", "has", "us", "in", "as", "the", "well", "her", "is", "not", "all", "to")


def write_block_model(path: Path, blocks: int = 2) -> Path:
    """A model of random weights whose columns differ in size, so that inputs go together."""
    tokens = vocabulary(())
    tensors = tuple(
        TensorPlan(name, array.shape, GGMLQuantizationType.F32, ArraySource(array))
        for name, array in _arrays(len(tokens), blocks).items()
    )
    write(Plan(_metadata(tokens, blocks), tensors), path, workers=1)
    return path


def write_text(path: Path, seed: int, words: int = 2500) -> Path:
    """Words at random, other ones for another seed."""
    draw = np.random.default_rng(seed)
    path.write_text(" ".join(draw.choice(WORDS, words)), encoding="utf-8")
    return path


def _metadata(tokens: list[str], blocks: int) -> dict[str, Value]:
    numbers = {
        "context_length": 512, "embedding_length": WIDTH, "block_count": blocks, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS // 2, "rope.dimension_count": WIDTH // HEADS,
    }  # fmt: skip
    strings, kinds = GGUFValueType.STRING, [3 if token.startswith("<") else 1 for token in tokens]
    kinds = [6 if token.startswith("<0x") else kind for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "general.architecture": string("llama"),
        **{f"llama.{key}": uint32(value) for key, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": Value(GGUFValueType.FLOAT32, 1e-5),
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.tokens": Value(GGUFValueType.ARRAY, list(tokens), strings),
        "tokenizer.ggml.scores": Value(
            GGUFValueType.ARRAY, [-float(i) for i in range(len(tokens))], GGUFValueType.FLOAT32
        ),
        "tokenizer.ggml.token_type": Value(GGUFValueType.ARRAY, kinds, GGUFValueType.INT32),
        "tokenizer.ggml.bos_token_id": uint32(tokens.index("<s>")),
        "tokenizer.ggml.eos_token_id": uint32(tokens.index("</s>")),
    }


def _arrays(tokens: int, blocks: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(11)

    def matrix(rows: int, columns: int = WIDTH, scale: float = 1.0) -> np.ndarray:
        return (scale * draw.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return draw.lognormal(0, 0.5, WIDTH).astype(np.float32)

    found = {"token_embd.weight": matrix(tokens), "output_norm.weight": norm(), "output.weight": matrix(tokens)}
    for number in range(blocks):
        shapes = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}
        found |= {f"blk.{number}.{name}.weight": matrix(rows) for name, rows in shapes.items()}
        found |= {f"blk.{number}.{name}.weight": matrix(INNER) for name in ("ffn_gate", "ffn_up")}
        found[f"blk.{number}.ffn_down.weight"] = matrix(WIDTH, INNER)
        found |= {f"blk.{number}.{name}.weight": norm() for name in ("attn_norm", "ffn_norm")}
    return found
