"""BERT and its relatives: WordPiece, pooling, what is refused, and embeddings against those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Case, build, like, sentencepiece_model
from encoder_checkpoints import (
    BERT,
    BERT_K,
    CONFIG,
    DISTILBERT,
    FILES,
    LINES,
    ROBERTA,
    ROBERTA_FILES,
    XLM_FILES,
    XLM_MODEL,
    bert,
    bert_tensors,
    distilbert,
    roberta,
    roberta_json,
    roberta_lines,
    sentence_transformer,
    unigram_json,
    wordpiece_json,
    wordpieces,
    xlm,
)
from hypothesis import given
from hypothesis import strategies as st
from parity import opened, published, run, tokens_of

from gguforge.convert import convert, plan
from gguforge.convert.conversion import plan_vocabulary
from gguforge.convert.vocabularies.protobuf import fields
from gguforge.quant.errors import CheckpointError, EngineError
from gguforge.quant.quantize import quantize
from gguforge.quant.reader import read_gguf
from gguforge.quant.receipt import make_receipt
from gguforge.quant.verification import check_hashes
from gguforge.quant.writer import write
from gguforge.runtime.engine import Engine
from gguforge.runtime.forward import Forward

TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


def quiet(line: str) -> None:
    """A warning that the test does not ask about."""


def refused(case: Case, folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        plan(build(case, folder), warn=quiet)
    assert "\n" not in str(caught.value)


def metadata(case: Case, folder: Path) -> dict[str, Any]:
    return {key: value.value for key, value in plan(build(case, folder), warn=quiet).metadata.items()}


@pytest.mark.parametrize("preset", ["Q4_0", "Q8_0", "Q4_K_M"])
def test_one_pass_equals_two(preset: str, tmp_path: Path) -> None:
    folder = build(bert(BERT_K), tmp_path)
    convert(folder, tmp_path / "one.gguf", type=preset, workers=1, warn=quiet)
    convert(folder, tmp_path / "auto.gguf", workers=1, warn=quiet)
    quantize(tmp_path / "auto.gguf", tmp_path / "two.gguf", preset, workers=1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


MODELS: dict[str, tuple[Case, str, str]] = {
    "bert": (bert(files=FILES | sentence_transformer(pooling_mode_mean_tokens=True)), "BertModel", "mean"),
    "bert-cls": (bert(files=FILES | sentence_transformer(pooling_mode_cls_token=True)), "BertModel", "cls"),
    "bert-masked": (bert(like(BERT, architectures=["BertForMaskedLM"])), "BertForMaskedLM", ""),
    "distilbert": (distilbert(), "DistilBertModel", ""),
    "roberta": (
        roberta(files=ROBERTA_FILES | sentence_transformer(pooling_mode_cls_token=True)),
        "RobertaModel",
        "cls",
    ),
    "roberta-masked": (roberta(like(ROBERTA, architectures=["RobertaForMaskedLM"])), "RobertaForMaskedLM", ""),
    "xlm-roberta": (xlm(), "XLMRobertaModel", ""),
    "roberta-files": (roberta(files=roberta_lines()), "RobertaModel", ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    case, class_name, pooling = MODELS[name]
    folder = build(case, tmp_path)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.3
    model = getattr(transformers, class_name)(config).eval()
    model.save_pretrained(folder)
    convert(folder, tmp_path / "out.gguf", type="F32", workers=1, warn=quiet)
    text = "The quick brown fox, she sells 3 shells!"
    ids = transformers.AutoTokenizer.from_pretrained(folder).encode(text)
    with torch.inference_mode():
        encoder = getattr(model, model.base_model_prefix, model)
        theirs = encoder(torch.tensor([ids])).last_hidden_state[0].numpy()
    theirs = {"mean": theirs.mean(0, keepdims=True), "cls": theirs[:1], "": theirs}[pooling]
    with opened(tmp_path / "out.gguf") as loaded:
        assert tokens_of(loaded, text) == ids
        ours = run(loaded, ids, embeddings=True)
    assert ours.shape == theirs.shape
    cosine = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert cosine.min() > 0.9999
    np.testing.assert_allclose(ours, theirs, atol=1e-2 * np.abs(theirs).max())  # gelu by a table, and by tanh


def cut(folder: Path, path: Path, texts: list[str]) -> None:
    """Whether llama.cpp cuts texts with a file's vocabulary as transformers does with the checkpoint's."""
    write(plan_vocabulary(folder, warn=quiet), path, workers=1)
    same_cuts(folder, path, texts)


def same_cuts(folder: Path, path: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with opened(path, vocab_only=True) as model:
        for text in texts:
            assert tokens_of(model, text, special=True) == tokenizer.encode(text), text


TEXTS = ["The quick fox.", "the QUICK br\u00f6wn fox jumping", "caf\u00e9 A \u4e2d\u4e2d,", "shelling dogs?", "", "zz9"]


@pytest.mark.parametrize(
    "files",
    [
        FILES,
        LINES,
        LINES | {"tokenizer_config.json": {**CONFIG, "do_lower_case": False}},
        LINES | {"tokenizer_config.json": {**CONFIG, "strip_accents": False}},
        FILES | {"tokenizer.json": wordpiece_json(lowercase=False),
                 "tokenizer_config.json": {**CONFIG, "do_lower_case": False}},
    ],
    ids=["json", "lines", "lines-cased", "lines-accents", "json-cased"],
)  # fmt: skip
def test_texts_are_cut_as_by_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    cut(build(bert(files=files), tmp_path), tmp_path / "out.gguf", TEXTS)


@pytest.mark.parametrize("files", [ROBERTA_FILES, roberta_lines()], ids=["json", "files"])
def test_texts_are_cut_as_by_roberta(files: dict[str, Any], tmp_path: Path) -> None:
    cut(build(roberta(files=files), tmp_path), tmp_path / "out.gguf", TEXTS)


XLM_TEXTS = ["the quick fox.", "  the   shelling dogs \uff21A ", "sea A shore, thing9", "", "caf\u00e9 \u4e2d"]


@pytest.mark.parametrize("files", [XLM_FILES | XLM_MODEL, XLM_FILES, XLM_MODEL], ids=["both", "json", "model"])
def test_texts_are_cut_as_by_xlm_roberta(files: dict[str, Any], tmp_path: Path) -> None:
    """The reference reads tokenizer.json, whatever the checkpoint has."""
    pytest.importorskip("transformers")
    folder = build(xlm(files=files), tmp_path)
    write(plan_vocabulary(folder, warn=quiet), tmp_path / "out.gguf", workers=1)
    (folder / "sentencepiece.bpe.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(unigram_json()), "utf-8")
    same_cuts(folder, tmp_path / "out.gguf", XLM_TEXTS)


def test_special_tokens_of_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    """vocab.txt alone does not tell GGUF where its special tokens are, and llama.cpp assumes BERT's places."""
    lines = [text for text in wordpieces() if not text.startswith("[unused")]
    files = {"vocab.txt": "\n".join(lines), "tokenizer_config.json": CONFIG}
    folder = build(bert(files=files), tmp_path)
    found = plan(folder, warn=quiet).metadata
    assert [found[f"tokenizer.ggml.{key}_token_id"].value for key in ("bos", "seperator", "unknown", "mask")] == [
        lines.index(text) for text in ("[CLS]", "[SEP]", "[UNK]", "[MASK]")
    ]
    cut(folder, tmp_path / "out.gguf", TEXTS)


@pytest.mark.skipif(not (TOKENIZERS / "bert-uncased").is_dir(), reason="the real tokenizers are not here")
def test_real_texts_are_cut_as_published(tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TOKENIZERS / "bert-uncased" / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(like(BERT, vocab_size=30522)))
    made = plan_vocabulary(tmp_path, warn=quiet)
    assert made.metadata["tokenizer.ggml.pre"].value == "jina-v2-en"
    write(made, tmp_path / "out.gguf", workers=1)
    with opened(tmp_path / "out.gguf", vocab_only=True) as model:
        for text, ids in published(TOKENIZERS / "ggml-vocab" / "ggml-vocab-bert-bge.gguf"):
            assert tokens_of(model, text, special=False) == ids, repr(text)


def with_model(**changes: Any) -> dict[str, Any]:
    tokenizer = wordpiece_json()
    return FILES | {"tokenizer.json": tokenizer | {"model": tokenizer["model"] | changes}}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "no tokenizer that can be read.*vocab.txt"),
        (with_model(type="BPE"), "tokenizer.json: the tokenizer's model cannot be converted.*WordPiece.*BPE"),
        (with_model(continuing_subword_prefix="@@"), "continued words are marked otherwise.*##.*@@"),
        (with_model(vocab=["a"]), "tokenizer.json: vocab is no table of ids"),
        (with_model(vocab={"a": 320}), "more tokens than the model"),
        ({"vocab.txt": "\n".join(map(str, range(321)))}, "vocab.txt: the tokenizer has more tokens than the model"),
        ({"vocab.txt": "a\n##\u2581a\n"}, "vocab.txt: two tokens are spelled alike.*ids 0 and 1"),
        ({"vocab.txt": b"\xff\xfe"}, "vocab.txt: text is not UTF-8"),
    ],
)  # fmt: skip
def test_damaged_vocabularies_are_refused(files: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(bert(files=files), tmp_path, match)


BPE_MODEL = {"sentencepiece.bpe.model": sentencepiece_model()}
WHOLE = XLM_MODEL["sentencepiece.bpe.model"]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "no tokenizer that can be read.*sentencepiece.bpe.model"),
        (BPE_MODEL, "sentencepiece.bpe.model: the sentencepiece model is of another kind .expected Unigram"),
        ({"sentencepiece.bpe.model": WHOLE[:-9]}, "this is no sentencepiece model"),
        ({"sentencepiece.bpe.model": b"\n\xff"}, "this is no sentencepiece model"),
        ({"tokenizer.json": roberta_json()}, "tokenizer.json: .*cannot be converted .expected Unigram, found BPE"),
        ({"tokenizer.json": unigram_json(model={"type": "Unigram", "vocab": {"a": 1}})}, "no list of texts"),
        ({"tokenizer.json": unigram_json(model={"type": "Unigram", "vocab": [["a"]]})}, "no list of texts with scores"),
        ({"tokenizer.json": unigram_json(model={"type": "Unigram", "vocab": [["a", 1]] * 321})}, "more tokens than"),
        ({"tokenizer.json": unigram_json(normalizer={"precompiled_charsmap": "#"})}, "charsmap is no base64"),
        ({"tokenizer.json": unigram_json(normalizer={"precompiled_charsmap": 7})}, "charsmap is no base64"),
    ],
)  # fmt: skip
def test_damaged_unigram_models_are_refused(files: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(xlm(files=files), tmp_path, match)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        assert all(number >= 0 for number, _ in fields(data))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_act": "relu"}, "'hidden_act' cannot be used .expected gelu.*found 'relu'"),
        ({"num_attention_heads": 7}, "'hidden_size' cannot be used"),
        ({"type_vocab_size": 3}, "token_type_embeddings.weight': shape does not fit"),
        ({"max_position_embeddings": 50}, "position_embeddings.weight': shape does not fit"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.attention.self.query.weight': tensor is missing"),
        ({"layer_norm_eps": "small"}, "'layer_norm_eps' cannot be used"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(bert(BERT | config, tensors=bert_tensors()), tmp_path, match)


@pytest.mark.parametrize("number", [49, 50, 10**6, -1, "1"])
def test_a_padding_token_that_leaves_no_positions(number: object, tmp_path: Path) -> None:
    refused(roberta(ROBERTA | {"pad_token_id": number}), tmp_path, "'pad_token_id' cannot be used")


def test_distilbert_names_its_own_fields(tmp_path: Path) -> None:
    case = Case(DISTILBERT | {"dim": "64"}, "none", tensors=distilbert().tensors, files=FILES)
    refused(case, tmp_path, "'dim' cannot be used")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (sentence_transformer(pooling_mode_max_tokens=True), "no such pooling.*mean.*pooling_mode_max_tokens"),
        (sentence_transformer(pooling_mode="weightedmean"), "no such pooling.*weightedmean"),
        ({"modules.json": {}}, "modules.json: unexpected JSON .expected a list"),
        ({"modules.json": [{"type": "Pooling", "path": "1_Pooling"}]}, "1_Pooling/config.json: .*config is missing"),
        ({"modules.json": [{"type": "Pooling", "path": "../../etc"}]}, "config is missing|outside"),
        ({"modules.json": [{"type": "Pooling", "path": 7}]}, "config is missing"),
    ],
)  # fmt: skip
def test_pooling_that_cannot_be_set_is_refused(files: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(bert(files=FILES | files), tmp_path, match)


def test_modules_without_pooling_set_none(tmp_path: Path) -> None:
    files = {"modules.json": [{"type": "sentence_transformers.models.Transformer", "path": ""}, "x"]}
    assert "bert.pooling_type" not in metadata(bert(files=FILES | files), tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"is_decoder": True}, "is_decoder = True has no counterpart"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' has no counterpart"),
        ({"classifier_dropout": None, "directionality": "bidi", "hidden_dropout_prob": 0.1, "gradient_checkpointing":
          False, "is_decoder": False, "use_cache": True}, ""),
    ],
)  # fmt: skip
def test_fields_that_change_the_result_are_reported(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    lines: list[str] = []
    plan(build(bert(BERT | config), tmp_path), warn=lines.append)
    assert [expected in line for line in lines] == [True] * bool(expected)


@pytest.mark.parametrize("reader", [Engine.open, lambda path: Forward.open(path, chunk=32, outputs=1)])
def test_an_encoder_does_not_continue_texts(reader: Callable[[Path], object], tmp_path: Path) -> None:
    convert(build(bert(), tmp_path), tmp_path / "out.gguf", workers=1, warn=quiet)
    with pytest.raises(EngineError, match=r"out.gguf: is not a model that continues text \(an encoder"):
        reader(tmp_path / "out.gguf")


@pytest.mark.parametrize("preset", ["AUTO", "Q4_K_M"])
def test_a_table_of_one_row_agrees_with_its_receipt(preset: str, tmp_path: Path) -> None:
    """llama.cpp's converter writes the dimension of one, its quantizer does not."""
    config = like(ROBERTA, hidden_size=256, intermediate_size=512)
    made = plan(build(roberta(config, tensors=bert_tensors(config)), tmp_path), preset, warn=quiet)
    written = write(made, tmp_path / "out.gguf", workers=1, hashed=True)
    file = read_gguf(tmp_path / "out.gguf")
    assert next(tensor.shape for tensor in file.tensors if tensor.name == "token_types.weight") == (
        (1, 256) if preset == "AUTO" else (256,)
    )
    assert check_hashes(file, make_receipt(made, written)) == []
