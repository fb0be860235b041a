"""RoBERTa and XLM-RoBERTa: BERT's graph with other tokenizers, and a position table that begins with unused rows."""

from __future__ import annotations

from dataclasses import replace

from gguforge.convert.architectures.base import nothing
from gguforge.convert.architectures.bert import BERT, DEFAULTS, UNUSED, encoder_sizes, token_types
from gguforge.convert.config import Config


def shifted_sizes(config: Config) -> dict[str, int]:
    """The sizes of a RoBERTa, whose first token has the position after that of the padding token."""
    sizes = encoder_sizes(config)
    padding = 0 if config.get("pad_token_id") is None else 1 + config.count("pad_token_id", least=0)
    if padding >= sizes["positions"]:
        raise config.wrong("pad_token_id", f"less than max_position_embeddings ({sizes['positions']})", padding - 1)
    return sizes | {"padding": padding, "context": sizes["positions"] - padding}


ROBERTA = replace(
    BERT,
    classes=("RobertaModel", "RobertaForMaskedLM"),
    prefix="roberta.",
    unused=UNUSED | {"lm_head.": "the head that predicts masked words"},
    defaults=DEFAULTS | {"pad_token_id": 1, "vocab_size": 50265},
    vocabularies=("byte_level",),
    sizes=shifted_sizes,
    before_tokenizer=nothing,
    after_tokenizer=token_types,
)

XLM_ROBERTA = replace(
    ROBERTA,
    classes=("XLMRobertaModel", "XLMRobertaForMaskedLM"),
    vocabularies=("unigram",),
    after_tokenizer=nothing,  # the count of token types stands in the middle
)
