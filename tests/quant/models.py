"""Small models for the tests, made from a formula: the same bytes with every version of NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import GGUFValueType

from gguforge.quant.blocks import encode
from gguforge.quant.metadata import Value, array, float32, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import FileSource


def weights(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Bell-shaped float32 numbers around 0 with a spread of 0.02, a sum of four hashes of the index."""
    index = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(4) + np.uint64(seed << 40)
    total = np.zeros(index.shape, np.int64)
    for k in range(4):
        x = (index + np.uint64(k)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        total += (x >> np.uint64(40)).astype(np.int64) - (1 << 23)
    return (total.astype(np.float32) * np.float32(0.02 / 2**23)).reshape(shape)


def metadata(
    architecture: str, layers: int, heads: int, heads_kv: int, hidden: int, ffn: int, vocabulary: int, experts: int
) -> dict[str, Value]:
    """What llama.cpp wants to know about a model."""
    a = architecture
    pieces = [f"<{i}>" if i < 3 else f"<0x{i - 3:02X}>" if i < 259 else f"t{i}" for i in range(vocabulary)]
    kinds = [2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1 for i in range(vocabulary)]
    found = {
        "general.architecture": string(a),
        "general.name": string("tiny"),
        f"{a}.block_count": uint32(layers),
        f"{a}.context_length": uint32(128),
        f"{a}.embedding_length": uint32(hidden),
        f"{a}.feed_forward_length": uint32(ffn),
        f"{a}.attention.head_count": uint32(heads),
        f"{a}.attention.head_count_kv": uint32(heads_kv),
        f"{a}.attention.layer_norm_rms_epsilon": float32(1e-5),
        f"{a}.attention.layer_norm_epsilon": float32(1e-5),
        f"{a}.rope.dimension_count": uint32(hidden // heads),
        "general.file_type": uint32(1),
        f"{a}.vocab_size": uint32(vocabulary),
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.tokens": array(GGUFValueType.STRING, pieces),
        "tokenizer.ggml.scores": array(GGUFValueType.FLOAT32, [-float(i) for i in range(vocabulary)]),
        "tokenizer.ggml.token_type": array(GGUFValueType.INT32, kinds),
    }
    if experts:
        found |= {f"{a}.expert_count": uint32(experts), f"{a}.expert_used_count": uint32(2)}
    return found


def tensors(
    layers: int, heads: int, heads_kv: int, hidden: int, ffn: int, vocabulary: int, experts: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the order of llama.cpp's converter."""
    kv = hidden // heads * heads_kv
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden)}
    for i in range(layers):
        e = (experts,) if experts else ()
        suffix = "_exps" if experts else ""
        block = {
            "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden), "ffn_norm": (hidden,), f"ffn_gate{suffix}": (*e, ffn, hidden),
            f"ffn_up{suffix}": (*e, ffn, hidden), f"ffn_down{suffix}": (*e, hidden, ffn),
        }  # fmt: skip
        if experts:
            block["ffn_gate_inp"] = (experts, hidden)
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not tied:
        shapes["output.weight"] = (vocabulary, hidden)
    return shapes


def build(
    folder: Path,
    type: T,
    architecture: str = "llama",
    layers: int = 9,
    heads: int = 8,
    heads_kv: int = 2,
    hidden: int = 256,
    ffn: int = 512,
    vocabulary: int = 300,
    experts: int = 0,
    tied: bool = False,
) -> Plan:
    """A random model, its matrices stored as `type` in a flat file in `folder`, as a plan ready to be written."""
    path = folder / "weights.bin"
    planned, offset = [], 0
    with path.open("wb") as file:
        shapes = tensors(layers, heads, heads_kv, hidden, ffn, vocabulary, experts, tied)
        for seed, (name, shape) in enumerate(shapes.items()):
            plain = len(shape) == 1 or "ffn_gate_inp" in name
            kind = T.F32 if plain else type
            data = encode(weights(seed, shape) + np.float32(len(shape) == 1), kind).tobytes()
            file.write(data)
            planned.append(TensorPlan(name, shape, kind, FileSource(str(path), offset, shape, kind)))
            offset += len(data)
    return Plan(metadata(architecture, layers, heads, heads_kv, hidden, ffn, vocabulary, experts), tuple(planned))
