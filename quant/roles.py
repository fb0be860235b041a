"""Roles: what a tensor does, read from its name, and the tensors that no preset touches.

The lists are llama.cpp's (src/llama-quant.cpp): its presets are defined by them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum, auto


class Role(Enum):
    """What a tensor does, as far as the rules care."""

    OUTPUT = auto()
    TOKEN_EMBEDDING = auto()
    VALUE = auto()  # attn_v, or a fused tensor that holds it
    KEY = auto()
    QUERY = auto()
    ATTENTION_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OTHER = auto()


ROLES = (
    ("attn_qkv.weight", Role.VALUE),
    ("attn_kv_b.weight", Role.VALUE),
    ("attn_v.weight", Role.VALUE),
    ("attn_k.weight", Role.KEY),
    ("attn_q.weight", Role.QUERY),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.FFN_UP),
    ("ffn_gate", Role.FFN_GATE),
    ("ffn_down", Role.FFN_DOWN),
)
"""Parts of names in the order in which they are looked for."""


def role(name: str) -> Role:
    """The role of a tensor by its name."""
    if name == "output.weight":
        return Role.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Role.TOKEN_EMBEDDING
    return next((found for part, found in ROLES if part in name), Role.OTHER)


def layer(name: str) -> int:
    """The layer a tensor belongs to, -1 for none.

    >>> layer("blk.12.attn_q.weight")
    12
    """
    match = re.match(r"blk\.(-?\d+)", name)
    return int(match[1]) if match else -1


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama-quantize orders tensors: layer, then name."""
    return layer(name), name


KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
"""Tensors with one of these in their name keep their type: small, or too sensitive."""
KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
GLM5_KEPT_PARTS = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
"""The same, in the architecture glm5-next alone."""


def is_quantizable(name: str, shape: Sequence[int], architecture: str = "") -> bool:
    """Whether any preset changes the type of a tensor: a weight matrix that is on no list."""
    kept = KEPT_PARTS + GLM5_KEPT_PARTS if architecture == "glm5-next" else KEPT_PARTS
    matrix = len(shape) >= 2 and any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and name not in KEPT_NAMES and not any(part in name for part in kept)
