"""BERT and DistilBERT: llama.cpp's `bert` graph, which embeds texts; heads and poolers are left out."""

from __future__ import annotations

import re

from gguforge.convert.architectures.base import Architecture, Row, Sizes, linear
from gguforge.convert.architectures.learned import learned_parameters, learned_sizes
from gguforge.convert.architectures.pooling import pooling
from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.config import Config
from gguforge.convert.json_file import Json
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.metadata import Value, array, boolean, float32, uint32

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python")
"""llama.cpp computes the tanh approximation for all of them."""

EPSILON = 1e-12
LABEL_NUMBER = re.compile(r"[0-9]{1,9}")
UNUSED = {
    "embeddings.position_ids": "the numbers from 0 on",
    "pooler.dense.": "the graph gives hidden states; pooling is set by the metadata",
    "cls.predictions": "the head that predicts masked words",
    "cls.seq_relationship": "the head that predicts the next sentence",
}
TRAINING_FIELDS = """
    attention_probs_dropout_prob classifier_dropout directionality hidden_dropout_prob layer_norm_eps pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type type_vocab_size
"""
DISTILBERT_FIELDS = "dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_ type_vocab_size"


def encoder_sizes(config: Config) -> dict[str, int]:
    """The sizes of a BERT."""
    return learned_sizes(config) | {"types": config.count("type_vocab_size")}


def encoder_metadata(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """Attention in both directions, the pooling of the sentence-transformers folder, and a classifier's labels."""
    pairs = {"attention.causal": boolean(False)} | pooling(checkpoint)
    labels = class_labels(config.values)
    return pairs | ({"classifier.output_labels": array(GGUFValueType.STRING, labels)} if labels else {})


def class_labels(config: Json) -> list[str]:
    """The labels of `id2label` in their order, less the two that transformers makes up.

    >>> class_labels({"id2label": {"1": "dog", "0": "cat"}}), class_labels({"id2label": {"0": "LABEL_0", "1": "x"}})
    (['cat', 'dog'], [])
    """
    table = config.get("id2label")
    items = table.items() if isinstance(table, dict) else ()
    labels = {int(key): text for key, text in items if LABEL_NUMBER.fullmatch(key) and isinstance(text, str)}
    made_up = len(labels) == 2 and labels.get(0) == "LABEL_0"
    return [] if made_up else [labels[i] for i in sorted(labels)]


def token_types(config: Config, checkpoint: Checkpoint) -> dict[str, Value]:
    """How many kinds of text there are to tell apart; llama.cpp gives every token the first."""
    return {"tokenizer.ggml.token_type_count": uint32(config.count("type_vocab_size"))}


def fixed_epsilon(config: Config, sizes: Sizes) -> dict[str, Value]:
    """DistilBERT's metadata: its code has one epsilon for all models, which llama.cpp's converter writes first."""
    return {"attention.layer_norm_epsilon": float32(EPSILON)} | learned_parameters(config, sizes)


ATTENTION = "encoder.layer.{i}.attention."
TENSORS = (
    Row("embeddings.word_embeddings.weight", "token_embd.weight", "vocab hidden"),
    Row("embeddings.token_type_embeddings.weight", "token_types.weight", "types hidden"),
    Row("embeddings.position_embeddings.weight", "position_embd.weight", "positions hidden", skip="padding"),
    *linear("embeddings.LayerNorm", "token_embd_norm", "hidden"),
    *linear(ATTENTION + "self.query", "blk.{i}.attn_q", "hidden hidden"),
    *linear(ATTENTION + "self.key", "blk.{i}.attn_k", "hidden hidden"),
    *linear(ATTENTION + "self.value", "blk.{i}.attn_v", "hidden hidden"),
    *linear(ATTENTION + "output.dense", "blk.{i}.attn_output", "hidden hidden"),
    *linear(ATTENTION + "output.LayerNorm", "blk.{i}.attn_output_norm", "hidden"),
    *linear("encoder.layer.{i}.intermediate.dense", "blk.{i}.ffn_up", "ffn hidden"),
    *linear("encoder.layer.{i}.output.dense", "blk.{i}.ffn_down", "hidden ffn"),
    *linear("encoder.layer.{i}.output.LayerNorm", "blk.{i}.layer_output_norm", "hidden"),
)
DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": EPSILON,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
EXPECTED = {"is_decoder": (False,), "position_embedding_type": ("absolute",)}

BERT = Architecture(
    name="bert",
    classes=("BertModel", "BertForMaskedLM"),
    prefix="bert.",
    endings={".gamma": ".weight", ".beta": ".bias"},
    tensors=TENSORS,
    unused=UNUSED,
    defaults=DEFAULTS,
    vocabularies=("wordpiece",),
    sizes=encoder_sizes,
    parameters=learned_parameters,
    metadata=encoder_metadata,
    before_tokenizer=token_types,
    activations=ACTIVATIONS,
    understood=frozenset(TRAINING_FIELDS.split()),
    expected=EXPECTED,
)

DISTILBERT = Architecture(
    name="bert",
    classes=("DistilBertModel", "DistilBertForMaskedLM"),
    prefix="distilbert.",
    endings=BERT.endings,
    tensors=(
        Row("embeddings.word_embeddings.weight", "token_embd.weight", "vocab hidden"),
        Row("embeddings.position_embeddings.weight", "position_embd.weight", "positions hidden"),
        *linear("embeddings.LayerNorm", "token_embd_norm", "hidden"),
        *linear("transformer.layer.{i}.attention.q_lin", "blk.{i}.attn_q", "hidden hidden"),
        *linear("transformer.layer.{i}.attention.k_lin", "blk.{i}.attn_k", "hidden hidden"),
        *linear("transformer.layer.{i}.attention.v_lin", "blk.{i}.attn_v", "hidden hidden"),
        *linear("transformer.layer.{i}.attention.out_lin", "blk.{i}.attn_output", "hidden hidden"),
        *linear("transformer.layer.{i}.sa_layer_norm", "blk.{i}.attn_output_norm", "hidden"),
        *linear("transformer.layer.{i}.ffn.lin1", "blk.{i}.ffn_up", "ffn hidden"),
        *linear("transformer.layer.{i}.ffn.lin2", "blk.{i}.ffn_down", "hidden ffn"),
        *linear("transformer.layer.{i}.output_layer_norm", "blk.{i}.layer_output_norm", "hidden"),
    ),
    unused=UNUSED | {"vocab_": "the head that predicts masked words"},
    defaults=DEFAULTS
    | {
        "activation": "gelu",
        "dim": 768,
        "hidden_dim": 3072,
        "n_heads": 12,
        "n_layers": 6,
        "type_vocab_size": 1,
    },
    vocabularies=BERT.vocabularies,
    sizes=encoder_sizes,
    parameters=fixed_epsilon,
    metadata=encoder_metadata,
    before_tokenizer=token_types,
    activations=ACTIVATIONS,
    understood=frozenset(DISTILBERT_FIELDS.split()),
    expected=EXPECTED,
    aliases={
        "hidden_act": "activation",
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
)
