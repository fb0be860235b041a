"""Llama and Mistral: llama.cpp's `llama` graph, whose rope interleaves what Hugging Face's splits in half."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gguforge.convert.architectures.base import Architecture, Row
from gguforge.convert.architectures.rotary import decoder_rows, rotary_parameters, rotary_sizes
from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.config import Config
from gguforge.quant.metadata import Value, boolean, uint32
from gguforge.quant.sources import ArraySource, Floats


def vocabulary_and_rotation(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """The two fields that llama.cpp's converter writes for this graph alone."""
    return {"vocab_size": uint32(config.count("vocab_size")), "rope.dimension_count": uint32(config.head_dim)}


def space_prefix(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """Whether a text begins with a space, where tokenizer_config.json says so."""
    prefix = checkpoint.object("tokenizer_config.json").get("add_prefix_space")
    return {"tokenizer.ggml.add_space_prefix": boolean(prefix)} if isinstance(prefix, bool) else {}


def special_cases(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """Two families known by the size of their vocabulary alone."""
    match config.count("vocab_size"):
        case 32016:  # Code Llama has an end-of-turn token of its own
            return {"tokenizer.ggml.eot_token_id": uint32(32010)}
        case 49152:  # Granite's small models ask for a bos they never saw
            return {"tokenizer.ggml.add_bos_token": boolean(False)}
        case _:
            return {}


def llama3_factors(config: Config) -> dict[str, ArraySource]:
    """`rope_freqs.weight` of Llama 3.1 and later: what each frequency is divided by; nothing for other rope types.

    Long wavelengths are stretched by `factor`, short ones not at all, and those between by a smooth blend.
    The arithmetic is float32, as in the reference; only the powers are correctly rounded, which torch's nearly always
    are. Source: Llama 3.1's published `apply_scaling`.
    """
    if config.rope_type != "llama3":
        return {}
    return {"rope_freqs.weight": ArraySource(_llama3_factors(config))}


def _llama3_factors(config: Config) -> Floats:
    one, d = np.float32(1), config.head_dim
    base = config.rope_number("rope_theta")
    factor, low, high = (
        np.float32(config.rope_number(name, default))
        for name, default in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    context = config.rope_number("original_max_position_embeddings", 8192)
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    powers = np.power(float(base), exponents, dtype=np.float64).astype(np.float32)  # float32 powers differ by machine
    frequencies = one / powers
    wavelengths = one / frequencies * np.float32(2 * np.pi)  # torch divides by multiplying with the reciprocal
    smooth = (one / wavelengths * np.float32(context) - low) / (high - low)
    blend = one / ((one - smooth) / factor + smooth)
    long, short = wavelengths > np.float32(context / float(low)), wavelengths < np.float32(context / float(high))
    return np.where(short, one, np.where(long, factor, blend)).astype(np.float32)


ATTENTION_BIASES = (
    Row("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias", "q", "attention_bias", "heads"),
    Row("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias", "kv", "attention_bias", "kv_heads"),
    Row("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias", "kv", "attention_bias"),
    Row("model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias", "hidden", "attention_bias"),
)
MLP_BIASES = (
    Row("model.layers.{i}.mlp.gate_proj.bias", "blk.{i}.ffn_gate.bias", "ffn", "mlp_bias"),
    Row("model.layers.{i}.mlp.up_proj.bias", "blk.{i}.ffn_up.bias", "ffn", "mlp_bias"),
    Row("model.layers.{i}.mlp.down_proj.bias", "blk.{i}.ffn_down.bias", "hidden", "mlp_bias"),
)

LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    tensors=decoder_rows(permuted=True, extra=ATTENTION_BIASES + MLP_BIASES),
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "head_dim": lambda config: config.count("hidden_size") // config.count("num_attention_heads"),
    },
    vocabularies=("sentencepiece", "byte_fallback", "byte_level"),
    sizes=rotary_sizes,
    parameters=rotary_parameters,
    metadata=vocabulary_and_rotation,
    before_tokenizer=space_prefix,
    after_tokenizer=special_cases,
    generated=llama3_factors,
    rope_types=("default", "linear", "yarn", "llama3"),
)

MISTRAL = replace(
    LLAMA,
    classes=("MistralForCausalLM",),
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
)
