"""What an architecture is: a table of tensors, the metadata it needs, and the config fields it understands.

An architecture is data (see `llama.py`, `gpt2.py`). This file holds the vocabulary such declarations are written in;
what decoders with rotary positions share is in `rotary.py`, models with learned positions in `learned.py`. Key names
and value types follow llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.config import Config
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, uint32
from gguforge.quant.sources import ArraySource

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS

Sizes = Mapping[str, int]
Metadata = Callable[[Config, Checkpoint], dict[str, Value]]


def nothing(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """No further metadata."""
    return {}


@dataclass(frozen=True)
class Row:
    """One tensor of the table.

    Attributes:
        source: its name in the checkpoint; {i} is the layer.
        name: its name in GGUF.
        shape: names of sizes, as the checkpoint stores it, row length last.
        when: config flag that says whether the checkpoint has it; "untied" is the absence of tie_word_embeddings.
        heads: for query and key, the size whose heads `PermuteHeads` puts into llama.cpp's order.
        transposed: the checkpoint stores columns where GGUF has rows.
        skip: the size that says how many leading rows are left out.
    """

    source: str
    name: str
    shape: str
    when: str = ""
    heads: str = ""
    transposed: bool = False
    skip: str = ""


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    Attributes:
        name: llama.cpp's name of the graph.
        classes: the Hugging Face class names it converts.
        tensors: the table.
        defaults: what transformers assumes for absent config fields.
        vocabularies: the kinds of tokenizer it may have, in the order in which they are looked for.
        sizes: what the table's shapes are written in, by name; "layers" is the number of layers.
        parameters: the metadata that the graph is built from, in file order.
        activations: the values of hidden_act that the graph computes.
        understood: config fields used beyond `UNDERSTOOD`, or without effect.
        expected: config fields of which only these values mean what the graph computes.
        aliases: what its config.json calls a field, by the name that most others use.
        prefix: what stands before tensor names where the checkpoint was saved by a class with a head.
        endings: older endings of tensor names, and what they are today.
        unused: beginnings of tensor names that the graph has no use for, with the reason.
        metadata: further metadata, written after the file type.
        before_tokenizer, after_tokenizer: metadata written around the tokenizer's, keys in full.
        generated: tensors made from the config, by GGUF name.
        rope_types: the kinds of rope scaling that reach llama.cpp.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[Row, ...]
    defaults: Mapping[str, object | Callable[[Config], object]]
    vocabularies: tuple[str, ...]
    sizes: Callable[[Config], dict[str, int]]
    parameters: Callable[[Config, Sizes], dict[str, Value]]
    activations: tuple[str, ...] = ("silu", "swish")
    understood: frozenset[str] = frozenset()
    expected: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    endings: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    metadata: Metadata = nothing
    before_tokenizer: Metadata = nothing
    after_tokenizer: Metadata = nothing
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


def hyperparameters(
    architecture: Architecture, config: Config, checkpoint: Checkpoint, file_type: int
) -> dict[str, Value]:
    """The metadata that llama.cpp builds the graph from, in the order of its converter."""
    arch = architecture.name
    own = {f"{arch}.{key}": value for key, value in architecture.parameters(config, architecture.sizes(config)).items()}
    own["general.file_type"] = uint32(file_type)
    return own | {f"{arch}.{key}": value for key, value in architecture.metadata(config, checkpoint).items()}


def linear(source: str, name: str, shape: str, *, transposed: bool = False) -> tuple[Row, Row]:
    """Weight and bias of a layer.

    Args:
        source, name: without `.weight` and `.bias`.
        shape: of the weight, as stored: outputs and inputs, or inputs and outputs if transposed.
    """
    out = shape.split()[-1 if transposed else 0]
    return (
        Row(f"{source}.weight", f"{name}.weight", shape, transposed=transposed),
        Row(f"{source}.bias", f"{name}.bias", out),
    )
