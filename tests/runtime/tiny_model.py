"""Writes Llama models of a few hundred kilobytes whose answers are known beforehand.

Attention and feed-forward add nothing, so the next token depends on the last one only: the token after a newline
begins the `answer`, each of its tokens leads to the next, and the last to the end token (or to the first, for ever).
A "random" model has real attention and is for comparing computations, not for reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<think>", "</think>", "[INST]")
USER_DEFINED = ("<think>", "</think>", "  ")
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LETTERS = [chr(code) for code in range(0x20, 0x7F) if chr(code) != " "]
MERGES = ["▁", "▁▁", "</", "</s", "<s", "he", "hel", "hell", "hello", "▁hello", "er", "in", "us", "use", "user", "as"]
ANSWER = ("▁Gguf", "▁files", "▁hold", "▁a", "▁model", ".")
NEWLINE = "<0x0A>"
DIMENSION, HEADS, LAYERS = 64, 4, 2


def vocabulary(answer: Sequence[str]) -> list[str]:
    """All tokens, in order, without repetition."""
    return list(dict.fromkeys([*SPECIALS, "  ", *BYTES, *LETTERS, *MERGES, *ANSWER, *answer]))


def write_tiny_model(
    path: Path,
    *,
    answer: Sequence[str] = ANSWER,
    endless: bool = False,
    template: str | None = CHATML,
    context: int = 512,
    random: bool = False,
    extra: dict[str, float | int] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a model; `extra` are float or int metadata keys."""
    tokens = vocabulary(answer)
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, context, template, extra or {})
    _add_tokenizer(writer, tokens)
    for name, array in _tensors(tokens, answer, endless, random).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, context: int, template: str | None, extra: dict[str, float | int]) -> None:
    numbers: dict[str, float | int] = {
        "general.file_type": 0,
        "llama.context_length": context,
        "llama.embedding_length": DIMENSION,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": DIMENSION,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS // 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": DIMENSION // HEADS,
    }
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (numbers | extra).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    kinds = gguf.TokenType
    special = {"<unk>": kinds.UNKNOWN, **dict.fromkeys(SPECIALS[1:], kinds.CONTROL)}
    special |= dict.fromkeys(USER_DEFINED, kinds.USER_DEFINED) | dict.fromkeys(BYTES, kinds.BYTE)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(place) for place in range(len(tokens))])
    writer.add_token_types([special.get(token, kinds.NORMAL) for token in tokens])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _tensors(tokens: list[str], answer: Sequence[str], endless: bool, random: bool) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)

    def weights(rows: int, scale: float = 1.0) -> np.ndarray:
        return (scale * draw.standard_normal((rows, DIMENSION)) / np.sqrt(DIMENSION)).astype(np.float32)

    embedding = weights(len(tokens))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    output = weights(len(tokens), 0.0)
    steps = [NEWLINE, *answer, answer[0] if endless else "<|im_end|>"]
    for last, following in pairwise(steps):
        output[tokens.index(following)] += 4 * embedding[tokens.index(last)]
    scale = 1.0 if random else 0.0
    result = {"token_embd.weight": embedding, "output_norm.weight": np.ones(DIMENSION, np.float32)}
    result["output.weight"] = weights(len(tokens), 4.0) if random else output
    for layer in range(LAYERS):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
            result[f"blk.{layer}.{name}.weight"] = weights(rows, scale)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            result[f"blk.{layer}.{name}.weight"] = weights(DIMENSION, scale)
        for name in ("attn_norm", "ffn_norm"):
            result[f"blk.{layer}.{name}.weight"] = np.ones(DIMENSION, np.float32)
    return result
