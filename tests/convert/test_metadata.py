"""Names, model cards and sampling settings; expected values were checked against gguf-py's heuristics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, Case, build

from gguforge.convert import plan
from gguforge.convert.metadata import front_matter
from gguforge.convert.names import NameParts, file_name, parse_name, size_label, titled

NAMES = [
    # name, parameters, (name, organization, basename, finetune, version, size)
    ("mistralai/Mistral-7B-Instruct-v0.2", 7_240_000_000, ("mistralai", "Mistral", "Instruct", "v0.2", "7B")),
    ("Qwen2.5-0.5B-Instruct", 494_000_000, (None, "Qwen2.5", "Instruct", None, "0.5B")),
    ("Llama-3.2-1B", 1_235_814_432, (None, "Llama-3.2", None, None, "1B")),
    ("Phi-3-mini-4k-instruct", 3_800_000_000, (None, "Phi-3", "4k-instruct", None, "mini")),
    ("Mixtral-8x7B-v0.1", 46_700_000_000, (None, "Mixtral", None, "v0.1", "8x7B")),
    ("bloom-7b1-petals", 7_100_000_000, (None, "bloom", "petals", None, "7.1B")),
    ("DeepSeek-R1-Distill-Qwen-1.5B", 1_780_000_000, (None, "DeepSeek-R1-Distill-Qwen", None, None, "1.5B")),
    ("./local-model", 0, (None, None, None, None, None)),
    ("a plain sentence 7B", 0, (None, None, None, None, None)),
    ("prose-8m", 8_392_960, (None, "prose", None, None, "8M")),
    ("-", 0, (None, None, None, None, None)),
]


@pytest.mark.parametrize(("name", "parameters", "expected"), NAMES)
def test_names_are_taken_apart(name: str, parameters: int, expected: tuple[str | None, ...]) -> None:
    parts = parse_name(name, parameters)
    assert (parts.organization, parts.basename, parts.finetune, parts.version, parts.size_label) == expected


def test_titles_and_labels() -> None:
    assert titled("my-model-v1.0-7b-GGUF") == "My Model v1.0 7b GGUF"
    assert titled(None) is None
    assert parse_name("") == NameParts("")
    assert [size_label(n) for n in (1, 999_999, 1_000_001, 70_000_000_000, 2 * 10**12)] == [
        "0.00K",
        "1000K",
        "1.0M",
        "70B",
        "2.0T",
    ]


def test_file_names_are_safe() -> None:
    assert file_name({"name": "../../etc/pass wd\n"}, "Q8_0") == "etc-pass-wd-Q8_0.gguf"
    assert file_name({}, "F16") == "model-F16.gguf"


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("", {}), ("no front matter", {}), ("---\n---\n", {}), ("---\nlicense: mit", {"license": "mit"}),
        ("---\nlanguage:\n\t- en\n---", {"language": ["en"]}), ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
    ],
)  # fmt: skip
def test_front_matter(text: str, card: dict[str, Any]) -> None:
    assert front_matter(text) == card


BAD_CARDS = {
    "a list": "---\n- a\n---",
    "not YAML": "---\na: [\n---",
    "a Python object": "---\na: !!python/object/apply:os.system ['true']\n---",
    "huge": "---\na: " + "x" * (1 << 20) + "\n---",
    "deep": "---\na: " + "[" * 5000 + "\n---",
    "not UTF-8": b"---\na: \xff\n---",
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_a_bad_card_is_reported_and_not_used(name: str, tmp_path: Path) -> None:
    lines: list[str] = []
    plan(build(Case(LLAMA, files={"README.md": BAD_CARDS[name]}), tmp_path), warn=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("README.md: model card not used")


def test_odd_values_of_a_card_become_text(tmp_path: Path) -> None:
    card = "---\nversion: 1.5\nlicense: [mit, gpl]\ntags: [1, true, 2024-01-02]\n"
    card += "author: .nan\nbase_model: [7, {name: 8}]\n---\n"
    pairs = plan(build(Case(LLAMA, files={"README.md": card}), tmp_path)).metadata
    values = {key.removeprefix("general."): value.value for key, value in pairs.items()}
    assert (values["version"], values["license"], values["author"]) == ("1.5", "mit,gpl", "nan")
    assert values["tags"] == ["1", "true", '"2024-01-02"']
    assert (values["base_model.count"], values["base_model.0.name"]) == (1, "8")


@pytest.mark.parametrize("value", ["hot", True, [0.7], 1e30, float("nan")])
def test_unusable_sampling_settings_are_reported(value: object, tmp_path: Path) -> None:
    lines: list[str] = []
    files = {"generation_config.json": {"temperature": value, "top_p": 0.5, "top_k": None}}
    pairs = plan(build(Case(LLAMA, files=files), tmp_path), warn=lines.append).metadata
    assert "general.sampling.temp" not in pairs
    assert pairs["general.sampling.top_p"].value == 0.5
    assert len(lines) == 1


def test_a_damaged_generation_config_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    plan(build(Case(LLAMA, files={"generation_config.json": "{"}), tmp_path), warn=lines.append)
    assert len(lines) == 1
