"""What an architecture is: a table of tensors, the metadata it needs, and the config fields it understands.

An architecture is data (see `llama.py`, `qwen.py`). This file holds the vocabulary such declarations are written in
and turns one into tensor rows and metadata for a given config. Key names and value types follow llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguforge.convert.config import Config
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, boolean, float32, string, uint32
from gguforge.quant.sources import ArraySource

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS


@dataclass(frozen=True)
class Row:
    """One tensor of the table.

    Attributes:
        source: its name in the checkpoint; {i} is the layer.
        name: its name in GGUF.
        shape: names of dimensions (see `dimensions`), row length last.
        when: config flag that says whether the checkpoint has it; "untied" is the absence of tie_word_embeddings.
        heads: for query and key, the dimension whose heads `PermuteHeads` puts into llama.cpp's order.
    """

    source: str
    name: str
    shape: str
    when: str = ""
    heads: str = ""


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    Attributes:
        name: llama.cpp's name of the graph.
        classes: the Hugging Face class names it converts.
        tensors: the table.
        defaults: what transformers assumes for absent config fields.
        vocabularies: the kinds of tokenizer it may have, in the order in which they are looked for.
        activations: the values of hidden_act that the graph computes.
        understood: config fields used beyond `UNDERSTOOD`.
        metadata: further metadata, written after the file type.
        generated: tensors made from the config, by GGUF name.
        rope_types: the kinds of rope scaling that reach llama.cpp.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[Row, ...]
    defaults: Mapping[str, object | Callable[[Config], object]]
    vocabularies: tuple[str, ...]
    activations: tuple[str, ...] = ("silu", "swish")
    understood: frozenset[str] = frozenset()
    metadata: Callable[[Config], dict[str, Value]] = lambda config: {}
    generated: Callable[[Config], dict[str, ArraySource]] = lambda config: {}
    rope_types: tuple[str, ...] = field(default=("default", "linear", "yarn"))


UNDERSTOOD = frozenset(
    """
    attention_bias head_dim hidden_act hidden_size intermediate_size is_causal max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads original_max_position_embeddings rms_norm_eps rope_theta
    tie_word_embeddings vocab_size
    """.split()  # noqa: SIM905 - sixty quotes less
)
"""Config fields that every architecture here uses."""


def dimensions(config: Config) -> dict[str, int]:
    """The sizes that tables of tensors are written in."""
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


def check(architecture: Architecture, config: Config) -> None:
    """Refuse what the graph cannot compute at all.

    Raises:
        CheckpointError: another activation function, or quantized weights.
    """
    activation = config.get("hidden_act")
    if activation not in architecture.activations:
        raise config.wrong("hidden_act", " or ".join(architecture.activations), activation)
    quantized = config.values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        remedy = "Convert the original checkpoint instead."
        raise CheckpointError("the weights are already quantized", path=config.path, found=str(method), remedy=remedy)


def hyperparameters(architecture: Architecture, config: Config, file_type: int) -> dict[str, Value]:
    """The metadata that llama.cpp builds the graph from, in the order of its converter."""
    sizes, arch = dimensions(config), architecture.name
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
    own = {f"{arch}.{key}": value for key, value in pairs.items()}
    own["general.file_type"] = uint32(file_type)
    return own | {f"{arch}.{key}": value for key, value in architecture.metadata(config).items()}


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
