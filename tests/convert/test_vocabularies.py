"""Vocabularies: pre-tokenizers by structure, the two kinds of tokenizer.json, special tokens and templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, PRE_TOKENIZERS, TEMPLATE, Case, build, spm_pieces

from gguforge.convert import plan
from gguforge.convert.vocabularies.pretokenizers import NAMES, STRUCTURES, find_pretokenizer, structure
from gguforge.convert.vocabularies.tokens import Kind
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value

PREFIX = "tokenizer.ggml."


def tokenizer_of(case: Case, folder: Path) -> dict[str, Any]:
    """The values under `tokenizer.` of a checkpoint."""
    pairs = plan(build(case, folder), warn=lambda line: None).metadata
    return {key.removeprefix(PREFIX): value.value for key, value in pairs.items() if key.startswith("tokenizer.")}


def with_files(name: str, kind: str = "byte_level", **changes: Any) -> Case:
    """A case with some fields of one of its files changed."""
    from checkpoints import TOKENIZERS

    base = TOKENIZERS[kind](Case(LLAMA))[name]
    return Case(LLAMA, kind, files={name: base | changes})


def split(*regexes: str, **byte_level: Any) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} for regex in regexes]
    return {"type": "Sequence", "pretokenizers": [*steps, {"type": "ByteLevel", "use_regex": False, **byte_level}]}


HAN = "[一-龥ࠀ-一가-퟿]+"
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "use_regex": False}
PUBLISHED: dict[str, Any] = {
    **PRE_TOKENIZERS,
    "tekken": split(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": split(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek-v3": split(
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
    "deepseek-coder": {
        "type": "Sequence",
        "pretokenizers": [*split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN)["pretokenizers"][:-1], DIGITS, BYTES],
    },
    "deepseek-llm": {
        "type": "Sequence",
        "pretokenizers": [
            *split("[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ]+", r"\s?[!-/]+", r"\s+$", HAN)["pretokenizers"][:-1],
            DIGITS,
            BYTES,
        ],
    },
    "qwen35": split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "seed-coder": split(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}|"
        " ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
}  # fmt: skip
"""Pre-tokenizers as the published tokenizer.json files have them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_pretokenizers_are_known_by_their_structure(name: str) -> None:
    tokenizer = {"pre_tokenizer": PUBLISHED[name], "model": {"ignore_merges": True}}
    assert find_pretokenizer(tokenizer, False, Path("tokenizer.json")) == name


def test_names_of_one_regex_are_told_apart_by_flags() -> None:
    llama3 = {"pre_tokenizer": PRE_TOKENIZERS["llama-bpe"]}
    path = Path("tokenizer.json")
    assert find_pretokenizer(llama3 | {"model": {"ignore_merges": False}}, False, path) == "smaug-bpe"
    assert find_pretokenizer({"pre_tokenizer": PRE_TOKENIZERS["smollm"]}, True, path) == "starcoder"


def test_added_tokens_do_not_change_the_pretokenizer(tmp_path: Path) -> None:
    added = {"id": 301, "content": "\U0001f999", "special": False, "normalized": False}
    case = with_files("tokenizer.json", added_tokens=[added])
    assert tokenizer_of(case, tmp_path)["pre"] == "llama-bpe"


@pytest.mark.parametrize(
    "pre_tokenizer", [None, {"type": "Whitespace"}, split(r"\w+"), {"type": "Sequence", "pretokenizers": []}]
)
def test_an_unknown_pretokenizer_is_refused_and_can_be_named(pre_tokenizer: Any, tmp_path: Path) -> None:
    folder = build(with_files("tokenizer.json", pre_tokenizer=pre_tokenizer), tmp_path)
    with pytest.raises(CheckpointError, match="--pre NAME"):
        plan(folder)
    assert plan(folder, pre="gpt-2").metadata["tokenizer.ggml.pre"].value == "gpt-2"
    with pytest.raises(CheckpointError, match=r"'gpt2' is not known.*gpt-2"):
        plan(folder, pre="gpt2")


def test_every_structure_has_a_name_that_llama_cpp_takes() -> None:
    assert set(STRUCTURES.values()) <= NAMES
    assert structure({"type": "ByteLevel"}) == (("bytes", "words"),)


def test_byte_fallback_vocabulary_is_the_sentencepiece_one(tmp_path: Path) -> None:
    """tokenizer.json alone gives the tokens and kinds that tokenizer.model gives, and scores in the same order."""
    ours = tokenizer_of(Case(LLAMA, "byte_fallback"), tmp_path / "a")
    theirs = tokenizer_of(Case(LLAMA), tmp_path / "b")
    assert ours["tokens"] == theirs["tokens"]
    assert ours["token_type"][3:] == theirs["token_type"][3:]
    merged = [i for i, (text, _, kind) in enumerate(spm_pieces()) if kind == 1 and len(text) > 1]
    assert sorted(merged, key=lambda i: -ours["scores"][i]) == sorted(merged, key=lambda i: -theirs["scores"][i])


def test_a_tiktoken_file_beside_tokenizer_json_is_passed_over(tmp_path: Path) -> None:
    case = Case(LLAMA, "byte_level", files={"tokenizer.model": "IQ== 0\nIg== 1\n"})
    assert tokenizer_of(case, tmp_path)["model"] == "gpt2"


def test_a_damaged_sentencepiece_model(tmp_path: Path) -> None:
    case = Case(LLAMA, files={"tokenizer.model": b"\x0a\xff\xff\xff\xff\xff\xff"})
    with pytest.raises(CheckpointError, match="no sentencepiece model"):
        plan(build(case, tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        plan(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "Unigram"}}, {"model": None}, {"model": {"vocab": []}}, {"model": {"vocab": {"a": "0"}}},
        {"model": {"vocab": {"a": -1}}}, {"model": {"vocab": {"a": 10**30}}}, {"model": {"vocab": {}, "merges": ["a"]}},
        {"model": {"vocab": {}, "merges": [["a", 1]]}}, {"model": {"vocab": {"a": 320}}},
    ],
)  # fmt: skip
def test_damaged_tokenizers_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        plan(build(with_files("tokenizer.json", **changes), tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry", [None, 7, {}, {"id": -1, "content": "x"}, {"id": "5", "content": "x"}, {"content": 5, "id": 300}]
)
def test_malformed_added_tokens_are_passed_over(entry: object, tmp_path: Path) -> None:
    assert len(tokenizer_of(with_files("tokenizer.json", added_tokens=[entry]), tmp_path)["tokens"]) == 320


def test_normalizers_that_llama_cpp_lacks_are_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    case = with_files(
        "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    )
    pairs = plan(build(case, tmp_path), warn=lines.append).metadata
    assert pairs["tokenizer.ggml.normalizer.lowercase"].value is True
    assert [line for line in lines if "NFKC" in line]


@pytest.mark.parametrize("i", [-1, 320, 10**12])
def test_ids_outside_the_vocabulary_are_left_out(i: int, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = build(Case(LLAMA | {"pad_token_id": i}), tmp_path)
    assert "tokenizer.ggml.padding_token_id" not in plan(folder, warn=lines.append).metadata
    assert [line for line in lines if "pad_token_id" in line]


def test_templates_keep_every_byte(tmp_path: Path) -> None:
    template = TEMPLATE + "\r\n\ttrailing \u00e9 \n\n"
    case = with_files("tokenizer_config.json", "sentencepiece", chat_template=template)
    assert tokenizer_of(case, tmp_path)["tokenizer.chat_template"] == template


def test_additional_templates_are_written_under_their_names(tmp_path: Path) -> None:
    files = {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool-use.jinja": "{{ tools }}"}
    pairs = tokenizer_of(Case(LLAMA, files=files), tmp_path)
    assert pairs["tokenizer.chat_template"] == TEMPLATE
    assert pairs["tokenizer.chat_templates"] == ["tool_use"]
    assert pairs["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_template_of_the_wrong_type_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    case = with_files("tokenizer_config.json", "sentencepiece", chat_template={"default": "x"})
    assert "tokenizer.chat_template" not in plan(build(case, tmp_path), warn=lines.append).metadata
    assert [line for line in lines if "chat_template" in line]


REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.mark.skipif(not (REAL / "mistral-hf").is_dir(), reason="the real tokenizers are not here")
def test_mistrals_two_files_give_one_vocabulary() -> None:
    """tokenizer.json's merges put the tokens in the order of tokenizer.model's scores."""
    from gguforge.convert.checkpoint import Checkpoint
    from gguforge.convert.vocabularies import tokenizer_metadata

    checkpoint = Checkpoint(REAL / "mistral-hf", {}, {})
    kinds = ("sentencepiece", "byte_fallback")
    model, fast = (tokenizer_metadata(checkpoint, 32000, kind, None, print) for kind in (kinds, kinds[1:]))

    def column(pairs: dict[str, Value], name: str) -> list[Any]:
        values = pairs[PREFIX + name].value
        assert isinstance(values, list)
        return values

    assert column(model, "tokens") == column(fast, "tokens")
    assert column(model, "token_type") == column(fast, "token_type")
    theirs, ours = column(model, "scores"), column(fast, "scores")
    normal = [i for i, kind in enumerate(column(model, "token_type")) if kind == Kind.NORMAL]
    merged = [i for i in normal if theirs[i] > -1e9 and ours[i] > -28000]  # no runs of spaces, no single characters
    assert len(merged) > 27900
    assert sorted(merged, key=lambda i: -theirs[i]) == sorted(merged, key=lambda i: -ours[i])


@pytest.mark.skipif(not (REAL / "gpt2-hf").is_dir(), reason="the real tokenizers are not here")
def test_gpt2_is_recognised() -> None:
    tokenizer = json.loads((REAL / "gpt2-hf" / "tokenizer.json").read_text("utf-8"))
    assert find_pretokenizer(tokenizer, False, REAL) == "gpt-2"
