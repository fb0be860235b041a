"""Tiny BERT-like checkpoints for the golden tests, made like those of checkpoints.py."""

from __future__ import annotations

from base64 import b64encode, b85decode
from collections.abc import Mapping
from string import ascii_lowercase, digits, punctuation
from typing import Any
from zlib import decompress

from checkpoints import TEXT, TOKENIZERS, VOCAB, Case, like, sentencepiece_model
from learned_checkpoints import Shapes

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": VOCAB,
}
BERT_K = like(BERT, hidden_size=256, intermediate_size=512)
DISTILBERT = {
    "architectures": ["DistilBertModel"],
    "model_type": "distilbert",
    "activation": "gelu",
    "dim": 64,
    "hidden_dim": 96,
    "max_position_embeddings": 48,
    "n_heads": 4,
    "n_layers": 2,
    "pad_token_id": 0,
    "sinusoidal_pos_embds": False,
    "vocab_size": VOCAB,
}
LAYER = {  # BERT's name, DistilBERT's name, size of the output and of the input
    "attention.self.query": ("attention.q_lin", "hidden", "hidden"),
    "attention.self.key": ("attention.k_lin", "hidden", "hidden"),
    "attention.self.value": ("attention.v_lin", "hidden", "hidden"),
    "attention.output.dense": ("attention.out_lin", "hidden", "hidden"),
    "attention.output.LayerNorm": ("sa_layer_norm", "hidden", ""),
    "intermediate.dense": ("ffn.lin1", "ffn", "hidden"),
    "output.dense": ("ffn.lin2", "hidden", "ffn"),
    "output.LayerNorm": ("output_layer_norm", "hidden", ""),
}


def _with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def bert_tensors(config: Mapping[str, Any] = BERT, prefix: str = "") -> Shapes:
    """Every tensor of a BERT without head and pooler."""
    sizes = {"hidden": config["hidden_size"], "ffn": config["intermediate_size"]}
    hidden = sizes["hidden"]
    table: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config.get("type_vocab_size", 2), hidden),
        **_with_bias("embeddings.LayerNorm", hidden),
    }
    for i in range(config["num_hidden_layers"]):
        for name, (_, out, inner) in LAYER.items():
            table |= _with_bias(f"encoder.layer.{i}.{name}", *(sizes[size] for size in (out, inner) if size))
    return {prefix + name: shape for name, shape in table.items()}


def distilbert_tensors(config: Mapping[str, Any] = DISTILBERT, prefix: str = "") -> Shapes:
    """Every tensor of a DistilBERT without head."""
    sizes = {"hidden": config["dim"], "ffn": config["hidden_dim"]}
    table: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], sizes["hidden"]),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], sizes["hidden"]),
        **_with_bias("embeddings.LayerNorm", sizes["hidden"]),
    }
    for i in range(config["n_layers"]):
        for name, out, inner in LAYER.values():
            table |= _with_bias(f"transformer.layer.{i}.{name}", *(sizes[size] for size in (out, inner) if size))
    return {prefix + name: shape for name, shape in table.items()}


def pooler(prefix: str = "") -> Shapes:
    """The layer that BERT puts on its first token, and a constant of old checkpoints."""
    return {**_with_bias(prefix + "pooler.dense", 64, 64), prefix + "embeddings.position_ids": (1, 48)}


def masked_head(hidden: int = 64) -> Shapes:
    """BertForMaskedLM's and BertForPreTraining's heads."""
    return {
        "cls.predictions.bias": (VOCAB,), "cls.predictions.decoder.weight": (VOCAB, hidden),
        **_with_bias("cls.predictions.transform.dense", hidden, hidden),
        **_with_bias("cls.predictions.transform.LayerNorm", hidden), **_with_bias("cls.seq_relationship", 2, hidden),
    }  # fmt: skip


def wordpieces() -> list[str]:
    """A vocabulary with BERT's special tokens at their places: letters, endings, words, some that do not come apart."""
    table = [f"[unused{i}]" for i in range(104)]
    for i, text in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        table[i] = text
    words = TEXT.replace(";", "").replace(",", "").split(" ")
    table += [*ascii_lowercase, *digits, *punctuation, *(f"##{c}" for c in ascii_lowercase)]
    return list(dict.fromkeys([*table, *words, "##ing", "##er", "sh", "\u4e2d", "caf", "A", "The"]))


SPECIAL_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
CONFIG = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]", "sep_token": "[SEP]",
          "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]", "model_max_length": 48,
          "clean_up_tokenization_spaces": True, "strip_accents": None}  # fmt: skip


def wordpiece_json(**normalizer: Any) -> dict[str, Any]:
    """tokenizer.json as transformers writes it for BERT."""

    def part(name: str, kind: str, i: int = 0) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": i}}

    first, last = part("[CLS]", "SpecialToken"), part("[SEP]", "SpecialToken")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in SPECIAL_IDS.items()],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True, **normalizer},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, part("A", "Sequence"), last],
            "pair": [first, part("A", "Sequence"), last, part("B", "Sequence", 1), part("[SEP]", "SpecialToken", 1)],
            "special_tokens": {text: {"id": text, "ids": [SPECIAL_IDS[text]], "tokens": [text]}
                               for text in ("[CLS]", "[SEP]")}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {text: i for i, text in enumerate(wordpieces())}},
    }  # fmt: skip


LINES = {"vocab.txt": "\n".join(wordpieces()) + "\n"}
FILES = {"tokenizer.json": wordpiece_json(), "tokenizer_config.json": CONFIG, **LINES}


def sentence_transformer(**pooling: Any) -> dict[str, Any]:
    """The files that sentence-transformers puts beside a model."""
    names = ("", "1_Pooling", "2_Normalize")
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
               for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]  # fmt: skip
    return {"modules.json": modules, "1_Pooling/config.json": {"word_embedding_dimension": 64, **pooling}}


def bert(config: Mapping[str, Any] = BERT, **changes: Any) -> Case:
    """A BERT with tokenizer.json, tokenizer_config.json and vocab.txt."""
    return Case(config, pre="default",
                **{"tokenizer": "none", "tensors": bert_tensors(config), "files": FILES, **changes})  # fmt: skip


def distilbert(**changes: Any) -> Case:
    """A DistilBERT with the same tokenizer."""
    return Case(DISTILBERT, "none", pre="default",
                **{"tensors": distilbert_tensors(), "files": FILES, **changes})  # fmt: skip


ROBERTA = like(BERT, architectures=["RobertaModel"], model_type="roberta", max_position_embeddings=50, bos_token_id=0,
               pad_token_id=1, eos_token_id=2, layer_norm_eps=1e-05, type_vocab_size=1)  # fmt: skip
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROBERTA_CONFIG = {"tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
                  "cls_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_prefix_space": False,
                  "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False,
                                 "rstrip": False, "single_word": False}}  # fmt: skip


def roberta_json() -> dict[str, Any]:
    """tokenizer.json as transformers writes it for RoBERTa: special tokens first, a template of its own."""
    tokenizer = TOKENIZERS["byte_level"](Case(BERT, pre="gpt-2"))["tokenizer.json"]
    texts = [*ROBERTA_SPECIALS[:4], *tokenizer["model"]["vocab"], "<mask>"]
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": texts.index(text), "content": text, "lstrip": text == "<mask>", **flags}
                                 for text in ROBERTA_SPECIALS]  # fmt: skip
    tokenizer["model"]["vocab"] = {text: i for i, text in enumerate(texts)}
    tokenizer["normalizer"] = None
    tokenizer["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
                                   "trim_offsets": True, "add_prefix_space": False}  # fmt: skip
    return tokenizer


ROBERTA_FILES = {"tokenizer.json": roberta_json(), "tokenizer_config.json": ROBERTA_CONFIG}


def roberta(config: Mapping[str, Any] = ROBERTA, **changes: Any) -> Case:
    """A RoBERTa with tokenizer.json."""
    known = {"tokenizer": "none", "tensors": bert_tensors(config), "files": ROBERTA_FILES}
    return Case(config, pre="roberta-bpe", **{**known, **changes})


def roberta_lines() -> dict[str, Any]:
    """The same tokenizer in vocab.json and merges.txt."""
    model = roberta_json()["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return {"vocab.json": model["vocab"], "merges.txt": "#version: 0.2\n" + merges,
            "tokenizer_config.json": ROBERTA_CONFIG}  # fmt: skip


XLM = like(ROBERTA, architectures=["XLMRobertaModel"], model_type="xlm-roberta")
CHARSMAP = decompress(b85decode(
    "c-kG(1I!%;5CGuUrm5}KHrLg*?XFn8+O}=Gf6dg}y8Xp!cc^XKZok({zFcy-TynV!gbRo;f#T7EIWRbMcGy734}n0i9D(peA|g?UOt3X7F^E"
    "nqViJeg#3L>Vh>vlBgd`>rNl8L-l97@Wq$U+<Nke+lk&z5!CKFl7LUyu|lN{vYM{@HMdC5b5@==fi6s8bGDME3IQIZmrrW9o<LwU+kkqT6%5"
    ">=@}b*fR58q}s1b*V#r>hUuTXhcJr(3qzDLUWqYk`}b46>a#HcC@7f?de2Ey3m<!bfpK~=|xZa(3^hrWdQvd#6X4w56>`$GJ@fZVkBc2%{ay"
    "~f$>aYB2$>mG^R3x>C9p#bC}IM=CXkKEMg%cEM_T7Sk5w5vVzsDVl8V}&pI~n)ZsSC8`;8Uwy~Ap`Hk)T!C(Bz4no<*PX1;$d)dQ&_HmE{9O"
    "e*5Il^&{agr1K%Rl_jf1KtNXF0=p&T)|oT;>v2xx#g>ag!U|<`#Fk!+q}YkOw^GQE+#j@SJD7<OQ#J#arI+o_BoY1E2ZCSH67zzi*+RgF6"
))  # fmt: skip
"""sentencepiece's compiled table for two replacements: A and full-width A become a (normalization_rule_tsv)."""


def unigram_pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of every piece of a small Unigram model: words, endings, characters."""
    words = ["\u2581" + word for word in TEXT.replace(";", "").replace(",", "").split(" ")]
    texts = list(
        dict.fromkeys([*words, "\u2581", "\u2581sh", "ing", *ascii_lowercase, *punctuation, *digits, "\u4e2d"])
    )
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    return pieces + [(text, -2.0 - i / 16, 1) for i, text in enumerate(texts)]


def unigram_json(**changes: Any) -> dict[str, Any]:
    """tokenizer.json as transformers writes it for XLM-RoBERTa."""
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    scored = [[text, 0.0] for text in ROBERTA_SPECIALS[:4]]
    scored += [[text, score] for text, score, _ in unigram_pieces()[3:]] + [["<mask>", 0.0]]
    texts = [text for text, _ in scored]
    start, end = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("<s>", "</s>"))
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": texts.index(text), "content": text, "lstrip": text == "<mask>", **flags}
                         for text in ROBERTA_SPECIALS],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": b64encode(CHARSMAP).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, a, end], "pair": [start, a, end, end, b, end],
            "special_tokens": {text: {"id": text, "ids": [texts.index(text)], "tokens": [text]}
                               for text in ("<s>", "</s>")}},
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": scored, "byte_fallback": False},
        **changes,
    }  # fmt: skip


XLM_CONFIG = {**ROBERTA_CONFIG, "tokenizer_class": "XLMRobertaTokenizer"}
XLM_FILES = {"tokenizer.json": unigram_json(), "tokenizer_config.json": XLM_CONFIG}
XLM_MODEL = {"sentencepiece.bpe.model": sentencepiece_model(unigram_pieces(), kind=1, charsmap=CHARSMAP),
             "tokenizer_config.json": XLM_CONFIG}  # fmt: skip


def xlm(**changes: Any) -> Case:
    """An XLM-RoBERTa with a sentencepiece model and tokenizer.json."""
    known = {"tokenizer": "none", "tensors": bert_tensors(XLM), "files": XLM_FILES | XLM_MODEL}
    return Case(XLM, **{**known, **changes})


MASKED = like(BERT, architectures=["BertForMaskedLM"])
OLD_NAMES = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): shape
             for name, shape in bert_tensors(prefix="bert.").items()}  # fmt: skip
ADDED = [{"id": len(wordpieces()) + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": True, "special": special} for i, (text, special) in enumerate([("newword", False),
                                                                                         ("[ENT]", True)])]  # fmt: skip
CASES: dict[str, Case] = {
    "bert": bert(extra=pooler()),
    "bert-f32-to-f16": bert(dtype="F32", type="F16"),
    "bert-f16-to-f32": bert(dtype="F16", type="F32"),
    "bert-masked": bert(MASKED, tensors=bert_tensors(prefix="bert."), extra=masked_head()),
    "bert-old-names": bert(MASKED, tensors=OLD_NAMES, extra=pooler("bert.")),
    "bert-lines": bert(files=LINES),
    "bert-lines-named": bert(files=LINES | {"tokenizer_config.json": CONFIG}),
    "bert-cased": bert(files=FILES | {"tokenizer.json": wordpiece_json(lowercase=False, strip_accents=False)}),
    "bert-added-tokens": bert(files=FILES | {
        "tokenizer.json": wordpiece_json() | {"added_tokens": wordpiece_json()["added_tokens"] + ADDED}}),
    "bert-mean": bert(files=FILES | sentence_transformer(pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)),
    "bert-cls": bert(files=FILES | sentence_transformer(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)),
    "bert-last": bert(files=FILES | sentence_transformer(pooling_mode="lasttoken")),
    "bert-labels": bert(like(BERT, id2label={"0": "no", "1": "yes", "2": "maybe"},
                             label2id={"no": 0, "yes": 1, "maybe": 2})),
    "bert-sparse-config": bert(
        like(BERT, type_vocab_size=None, hidden_act=None, layer_norm_eps=None, pad_token_id=None),
        tensors=bert_tensors()),
    "bert-sharded": bert(shards=3),
    "distilbert": distilbert(),
    "distilbert-masked": distilbert(
        tensors=distilbert_tensors(prefix="distilbert."),
        extra={**_with_bias("vocab_transform", 64, 64), **_with_bias("vocab_layer_norm", 64),
               "vocab_projector.bias": (VOCAB,)}),
    "roberta": roberta(extra=pooler()),
    "roberta-prefix": roberta(tensors=bert_tensors(ROBERTA, "roberta."), dtype="F16"),
    "roberta-no-padding": roberta(like(ROBERTA) | {"pad_token_id": None}),
    "roberta-sparse-config": roberta(like(ROBERTA, pad_token_id=None), dtype="F32", type="F32"),
    "xlm-roberta": xlm(),
    "xlm-roberta-json": xlm(files=XLM_FILES),
}  # fmt: skip
