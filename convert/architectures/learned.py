"""What models with learned positions share: a row of the position table is added to every token's embedding."""

from __future__ import annotations

from gguforge.convert.architectures.base import MAX_LAYERS, Sizes
from gguforge.convert.config import Config
from gguforge.quant.metadata import Value, float32, uint32


def learned_sizes(config: Config) -> dict[str, int]:
    """The sizes of a model with learned positions; its heads divide the hidden size among them."""
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    if hidden % heads:
        raise config.wrong("hidden_size", f"a multiple of the number of heads ({heads})", hidden)
    positions = config.count("max_position_embeddings")
    return {
        "layers": config.count("num_hidden_layers", MAX_LAYERS),
        "vocab": config.count("vocab_size"),
        "positions": positions,
        "padding": 0,
        "context": positions,
        "hidden": hidden,
        "ffn": config.count("intermediate_size"),
        "heads": heads,
        "qkv": 3 * hidden,
    }


def learned_parameters(config: Config, sizes: Sizes) -> dict[str, Value]:
    """The metadata of a model with learned positions."""
    return {
        "block_count": uint32(sizes["layers"]),
        "context_length": uint32(sizes["context"]),
        "embedding_length": uint32(sizes["hidden"]),
        "feed_forward_length": uint32(sizes["ffn"]),
        "attention.head_count": uint32(sizes["heads"]),
        "attention.layer_norm_epsilon": float32(config.number("layer_norm_eps")),
    }
