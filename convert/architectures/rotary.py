"""What decoders with a rotary position embedding share: Llama's sizes, metadata and table."""

from __future__ import annotations

from gguforge.convert.architectures.base import MAX_LAYERS, Row, Sizes
from gguforge.convert.config import Config
from gguforge.quant.metadata import Value, boolean, float32, string, uint32


def rotary_sizes(config: Config) -> dict[str, int]:
    """The sizes of a Llama-like decoder."""
    heads, kv_heads, head = config.count("num_attention_heads"), config.kv_heads, config.head_dim
    if head % 2:
        raise config.wrong("head_dim", "an even number, for the rotary embedding", head)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})", kv_heads)
    return {
        "layers": config.count("num_hidden_layers", MAX_LAYERS),
        "vocab": config.count("vocab_size"),
        "hidden": config.count("hidden_size"),
        "ffn": config.count("intermediate_size"),
        "head": head,
        "heads": heads,
        "kv_heads": kv_heads,
        "q": heads * head,
        "kv": kv_heads * head,
    }


def rotary_parameters(config: Config, sizes: Sizes) -> dict[str, Value]:
    """The metadata of a Llama-like decoder."""
    pairs = {
        "block_count": uint32(sizes["layers"]),
        "context_length": uint32(config.count("max_position_embeddings")),
        "embedding_length": uint32(sizes["hidden"]),
        "feed_forward_length": uint32(sizes["ffn"]),
        "attention.head_count": uint32(sizes["heads"]),
        "attention.head_count_kv": uint32(sizes["kv_heads"]),
    }
    if config.get("is_causal") is False:
        pairs["attention.causal"] = boolean(False)
    pairs |= rope_scaling(config)
    pairs["rope.freq_base"] = float32(config.rope_number("rope_theta"))
    pairs["attention.layer_norm_rms_epsilon"] = float32(config.number("rms_norm_eps"))
    if config.get("head_dim") is not None:
        pairs |= {"attention.key_length": uint32(sizes["head"]), "attention.value_length": uint32(sizes["head"])}
    return pairs


def rope_scaling(config: Config) -> dict[str, Value]:
    """Linear and YaRN stretching of the rotary embedding; llama3's goes into a tensor of factors instead."""
    kind, rope = config.rope_type, config.rope
    if kind not in ("linear", "yarn") or rope.get("factor") is None:
        return {}
    pairs = {"type": string(kind), "factor": float32(config.rope_number("factor"))}
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        pairs["original_context_length"] = uint32(context or config.count("max_position_embeddings"))
        attention = "attention_factor" if "attention_factor" in rope else "attn_factor"
        optional = {
            "yarn_ext_factor": "extrapolation_factor",
            "yarn_attn_factor": attention,
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        pairs |= {
            key: float32(config.rope_number(name)) for key, name in optional.items() if rope.get(name) is not None
        }
    return {f"rope.scaling.{key}": value for key, value in pairs.items()}


def decoder_rows(*, permuted: bool = False, extra: tuple[Row, ...] = ()) -> tuple[Row, ...]:
    """The table of a Llama-like decoder without its biases: embeddings, norms, attention, gated feed-forward."""
    layer, block = "model.layers.{i}.", "blk.{i}."
    q, k = ("heads", "kv_heads") if permuted else ("", "")
    return (
        Row("model.embed_tokens.weight", "token_embd.weight", "vocab hidden"),
        Row("model.norm.weight", "output_norm.weight", "hidden"),
        Row("lm_head.weight", "output.weight", "vocab hidden", when="untied"),
        Row(layer + "input_layernorm.weight", block + "attn_norm.weight", "hidden"),
        Row(layer + "self_attn.q_proj.weight", block + "attn_q.weight", "q hidden", heads=q),
        Row(layer + "self_attn.k_proj.weight", block + "attn_k.weight", "kv hidden", heads=k),
        Row(layer + "self_attn.v_proj.weight", block + "attn_v.weight", "kv hidden"),
        Row(layer + "self_attn.o_proj.weight", block + "attn_output.weight", "hidden q"),
        Row(layer + "post_attention_layernorm.weight", block + "ffn_norm.weight", "hidden"),
        Row(layer + "mlp.gate_proj.weight", block + "ffn_gate.weight", "ffn hidden"),
        Row(layer + "mlp.up_proj.weight", block + "ffn_up.weight", "ffn hidden"),
        Row(layer + "mlp.down_proj.weight", block + "ffn_down.weight", "hidden ffn"),
        *extra,
    )
