"""Twelve released models as names and shapes of their tensors, written down from their published configurations.

What the types depend on is checked by the golden file: names, row lengths, whether a tensor stacks experts. Row lengths
that are no multiple of 256 show there as fallbacks. What it cannot show is the number of rows (the totals are checked
against the published sizes), and tensors that no preset ever gives another type than its base (DeepSeek's attn_v_b).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gguf.constants import GGUFValueType

from gguforge.quant.metadata import Value, array, string, uint32

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RealModel:
    """A model's sizes, and groups of layers with the shapes of their weights (rows, columns) by name within a layer.

    Vectors are left out but for a norm; matrices that are never quantized are in, as traps.
    """

    architecture: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    heads_kv: int | list[int]
    blocks: tuple[tuple[Iterable[int], Shapes], ...]
    experts: int = 0
    tied: bool = False

    @property
    def shapes(self) -> Shapes:
        """All tensors."""
        table = (self.vocabulary, self.hidden)
        found = {"token_embd.weight": table} | ({} if self.tied else {"output.weight": table})
        for layers, shapes in self.blocks:
            found |= {f"blk.{i}.{name}.weight": shape for i in layers for name, shape in shapes.items()}
        return found | {f"blk.{i}.attn_norm.weight": (self.hidden,) for i in range(self.layers)}

    @property
    def metadata(self) -> dict[str, Value]:
        """What the rules read."""
        a, kv = self.architecture, self.heads_kv
        found = {
            "general.architecture": string(a),
            f"{a}.block_count": uint32(self.layers),
            f"{a}.attention.head_count": uint32(self.heads),
            f"{a}.attention.head_count_kv": array(GGUFValueType.INT32, kv) if isinstance(kv, list) else uint32(kv),
        }
        return found | ({f"{a}.expert_count": uint32(self.experts)} if self.experts else {})


def attention(hidden: int, heads: int, heads_kv: int, size: int, gated: bool = False) -> Shapes:
    """Query, key, value and output; a gated query has a second half."""
    q, kv = heads * size, heads_kv * size
    return {
        "attn_q": (q * (1 + gated), hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
    }


def ffn(hidden: int, size: int, suffix: str = "", experts: tuple[int, ...] = ()) -> Shapes:
    """Gate, up and down."""
    wide = (*experts, size, hidden)
    return {f"ffn_gate{suffix}": wide, f"ffn_up{suffix}": wide, f"ffn_down{suffix}": (*experts, hidden, size)}


def mixture(hidden: int, experts: int, size: int, shared: int = 0) -> Shapes:
    """Router, experts and shared experts."""
    found = ffn(hidden, size, "_exps", (experts,)) | {"ffn_gate_inp": (experts, hidden)}
    return found | (ffn(hidden, shared, "_shexp") if shared else {})


def linear_attention(hidden: int, keys: int, values: int) -> Shapes:
    """A gated delta net with heads of 128: fused projection, gate, convolution, output."""
    k, v = keys * 128, values * 128
    return {
        "attn_qkv": (2 * k + v, hidden),
        "attn_gate": (v, hidden),
        "ssm_conv1d": (2 * k + v, 4),
        "ssm_out": (hidden, v),
    }


def dense(
    architecture: str,
    layers: int,
    hidden: int,
    vocabulary: int,
    size: int,
    heads: tuple[int, int, int],
    tied: bool = False,
) -> RealModel:
    """A model like Llama; `heads` are query heads, key/value heads, and their size."""
    blocks = ((range(layers), attention(hidden, *heads) | ffn(hidden, size)),)
    return RealModel(architecture, layers, hidden, vocabulary, *heads[:2], blocks, tied=tied)


def latent_attention(hidden: int, heads: int, query_rank: int, rank: int) -> Shapes:
    """DeepSeek's: heads of 128 + 64 rotary from latent vectors, key and value projections split by head."""
    return {
        "attn_q_a": (query_rank, hidden),
        "attn_q_b": (heads * 192, query_rank),
        "attn_kv_a_mqa": (rank + 64, hidden),
        "attn_k_b": (heads, rank, 128),
        "attn_v_b": (heads, 128, rank),
        "attn_output": (hidden, heads * 128),
    }


def hybrid(
    layers: int, hidden: int, heads: int, heads_kv: int, linear: Shapes, feed: Shapes
) -> tuple[tuple[Iterable[int], Shapes], ...]:
    """Qwen's: every fourth layer has full attention, with a gated query and heads of 256, the others have linear."""
    full = range(3, layers, 4)
    others = [i for i in range(layers) if i not in full]
    return (range(layers), feed), (full, attention(hidden, heads, heads_kv, 256, gated=True)), (others, linear)


def gates(hidden: int, heads: int) -> Shapes:
    """Decay and write strength of linear attention, a row a head."""
    return {"ssm_alpha": (heads, hidden), "ssm_beta": (heads, hidden)}


NEMOTRON_ATTENTION = [5, 12, 19, 26, 33, 42]
NEMOTRON_EXPERTS = [1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51]
NEMOTRON_MAMBA = [i for i in range(52) if i not in NEMOTRON_ATTENTION and i not in NEMOTRON_EXPERTS]
NEMOTRON_FFN = {
    "ffn_gate_inp": (128, 2688), "ffn_up_exps": (128, 1856, 2688), "ffn_down_exps": (128, 2688, 1856),
    "ffn_up_shexp": (3712, 2688), "ffn_down_shexp": (2688, 3712),
}  # fmt: skip
NEMOTRON_SSM = {"ssm_in": (10304, 2688), "ssm_out": (2688, 4096), "ssm_conv1d": (6144, 4)}

STEP_FULL = range(0, 45, 4)
STEP_SLIDING = [i for i in range(45) if i not in STEP_FULL]

REAL_MODELS = {
    "deepseek-v3.1": RealModel(
        "deepseek2", 61, 7168, 129280, 128, 1,
        (
            (range(61), latent_attention(7168, 128, 1536, 512)),
            (range(3), ffn(7168, 18432)),
            (range(3, 61), mixture(7168, 256, 2048, 2048)),
        ),
        experts=256,
    ),
    "gemma-3-4b-it": dense("gemma3", 34, 2560, 262144, 10240, (8, 4, 256), tied=True),
    "glm-4.6v": RealModel(
        "glm4moe", 46, 4096, 151552, 96, 8,
        (
            (range(46), attention(4096, 96, 8, 128)),
            (range(1), ffn(4096, 10944)),
            (range(1, 46), mixture(4096, 128, 1408, 1408)),
        ),
        experts=128,
    ),
    "gpt-oss-120b": RealModel(
        "gpt-oss", 36, 2880, 201088, 64, 8,
        ((range(36), attention(2880, 64, 8, 64) | mixture(2880, 128, 2880)),),
        experts=128,
    ),
    "meta-llama-3.1-70b-instruct": dense("llama", 80, 8192, 128256, 28672, (64, 8, 128)),
    "nvidia-nemotron-3-nano-30b-a3b": RealModel(
        "nemotron_h_moe", 52, 2688, 131072, 32, [2 if i in NEMOTRON_ATTENTION else 0 for i in range(52)],
        (
            (NEMOTRON_ATTENTION, attention(2688, 32, 2, 128)),
            (NEMOTRON_EXPERTS, NEMOTRON_FFN),
            (NEMOTRON_MAMBA, NEMOTRON_SSM),
        ),
        experts=128,
    ),
    "qwen3-0.6b": dense("qwen3", 28, 1024, 151936, 3072, (16, 8, 128)),
    "qwen3-14b": dense("qwen3", 40, 5120, 151936, 17408, (40, 8, 128)),
    "qwen3-coder-next": RealModel(
        "qwen3next", 48, 2048, 151936, 16, 2,
        hybrid(48, 2048, 16, 2, linear_attention(2048, 16, 32) | {"ssm_ba": (64, 2048)}, mixture(2048, 512, 512, 512)),
        experts=512,
    ),
    "qwen3.5-397b-a17b": RealModel(
        "qwen35moe", 60, 4096, 248320, 32, 2,
        hybrid(60, 4096, 32, 2, linear_attention(4096, 16, 64) | gates(4096, 64), mixture(4096, 512, 1024, 1024)),
        experts=512,
    ),
    "qwen3.6-27b": RealModel(
        "qwen35", 64, 5120, 248320, 24, 4,
        hybrid(64, 5120, 24, 4, linear_attention(5120, 16, 48) | gates(5120, 48), ffn(5120, 17408)),
    ),
    "step-3.5-flash": RealModel(
        "step35", 45, 4096, 128896, 64, 8,
        (
            (STEP_FULL, attention(4096, 64, 8, 128) | {"attn_gate": (64, 4096)}),
            (STEP_SLIDING, attention(4096, 96, 8, 128) | {"attn_gate": (96, 4096)}),
            (range(3), ffn(4096, 11264)),
            (range(3, 45), mixture(4096, 288, 1280, 1280)),
        ),
        experts=288,
    ),
}  # fmt: skip
"""By the name of llama.cpp's golden file."""
