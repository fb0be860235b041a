"""Qwen2, Qwen2.5 and Qwen3: llama.cpp's `qwen2` and `qwen3` graphs, which split rope in half as Hugging Face does."""

from __future__ import annotations

from gguforge.convert.architectures.base import Architecture, Row
from gguforge.convert.architectures.rotary import decoder_rows, rotary_parameters, rotary_sizes

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
}

QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    tensors=decoder_rows(
        extra=(
            Row("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "q"),
            Row("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "kv"),
            Row("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "kv"),
        )
    ),
    defaults=DEFAULTS,
    vocabularies=("sentencepiece", "byte_level"),
    sizes=rotary_sizes,
    parameters=rotary_parameters,
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    tensors=decoder_rows(
        extra=(
            Row("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight", "head"),
            Row("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight", "head"),
            Row("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "q", "attention_bias"),
            Row("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "kv", "attention_bias"),
            Row("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "kv", "attention_bias"),
        )
    ),
    defaults={**DEFAULTS, "head_dim": 128},
    vocabularies=("sentencepiece", "byte_level"),
    sizes=rotary_sizes,
    parameters=rotary_parameters,
)
