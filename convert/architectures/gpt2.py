"""GPT-2: llama.cpp's `gpt2` graph. Its layers are `Conv1D`, which stores the transpose of a linear layer's weight."""

from __future__ import annotations

from gguforge.convert.architectures.base import Architecture, Row, linear
from gguforge.convert.architectures.learned import learned_parameters, learned_sizes

GPT2 = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    prefix="transformer.",
    tensors=(
        Row("wte.weight", "token_embd.weight", "vocab hidden"),
        Row("wpe.weight", "position_embd.weight", "positions hidden"),
        *linear("ln_f", "output_norm", "hidden"),
        Row("lm_head.weight", "output.weight", "vocab hidden", when="untied"),
        *linear("h.{i}.ln_1", "blk.{i}.attn_norm", "hidden"),
        *linear("h.{i}.attn.c_attn", "blk.{i}.attn_qkv", "hidden qkv", transposed=True),
        *linear("h.{i}.attn.c_proj", "blk.{i}.attn_output", "hidden hidden", transposed=True),
        *linear("h.{i}.ln_2", "blk.{i}.ffn_norm", "hidden"),
        *linear("h.{i}.mlp.c_fc", "blk.{i}.ffn_up", "hidden ffn", transposed=True),
        *linear("h.{i}.mlp.c_proj", "blk.{i}.ffn_down", "ffn hidden", transposed=True),
    ),
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": lambda config: 4 * config.count("hidden_size"),
        "n_layer": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
        "vocab_size": 50257,
    },
    vocabularies=("byte_level",),
    sizes=learned_sizes,
    parameters=learned_parameters,
    activations=("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    understood=frozenset(
        """
        n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type
        summary_use_proj
        """.split()  # noqa: SIM905 - a dozen quotes less
    ),
    expected={"scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,)},
    aliases={
        "hidden_act": "activation_function",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
