"""Tiny encoders with random weights, with the classes, files and tokenizers' formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import TEXT, learn_merges, like

from gguforge.convert.vocabularies.bpe import byte_characters

WORDS = sorted({word.strip(";,") for word in TEXT.split()})
PIECES = [*"abcdefghijklmnopqrstuvwxyz,;.", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
BERT = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 5 + len(WORDS) + len(PIECES),
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_act": "gelu",
    "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = like(
    BERT, architectures=["RobertaForMaskedLM"], model_type="roberta", vocab_size=301, max_position_embeddings=66,
    type_vocab_size=1, layer_norm_eps=1e-05, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
CLS_POOLING = {
    "word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
}  # fmt: skip


def bert(folder: Path, **changes: Any) -> Path:
    """A BERT with its WordPiece vocabulary."""
    from transformers import BertTokenizerFast

    _weights(folder, like(BERT, **changes))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def roberta(folder: Path, **changes: Any) -> Path:
    """A RoBERTa with its byte-level vocabulary, whose last token is the mask."""
    from transformers import RobertaTokenizerFast

    _weights(folder, like(ROBERTA, **changes))
    by_byte = {byte: character for character, byte in byte_characters().items()}
    symbols = [[by_byte[byte] for byte in (" " + word).encode()] for word in TEXT.split(" ")]
    merges = learn_merges(symbols, 40)
    texts = ["<s>", "<pad>", "</s>", "<unk>", *by_byte.values(), *(left + right for left, right in merges), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}), encoding="utf-8")
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def sentences(folder: Path, **changes: Any) -> Path:
    """A BERT that embeds texts by their first token, as a sentence-transformers folder."""
    bert(folder, architectures=["BertModel"], **changes)
    types = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(types.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(CLS_POOLING), encoding="utf-8")
    return folder


def _weights(folder: Path, config: dict[str, Any]) -> None:
    from gguforge.distill.students import fresh_model

    model = fresh_model(config, folder / "config.json", seed=0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "position" not in name:
            weight.data *= 20  # so that texts differ
    model.save_pretrained(folder)
