"""`--rules` and `--print-rules`: a table is printed, copied, edited, used, explained, and refused where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from checkpoints import SMALL_K, Case, build
from running import refused, run

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.reader import read_gguf
from gguforge.quant.writer import write


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "mixture-F16.gguf"
    write(models.build(path.parent, T.F16, layers=2, experts=4, ffn=256), path, workers=1)
    return path


def explained(*words: object) -> dict[str, tuple[str, str]]:
    """Type and rule by tensor."""
    done = run("quantize", *words, "--type", "Q4_K_M", "--dry-run", "--explain", "--json")
    return {row["tensor"]: (row["type"], row["rule"]) for row in json.loads(done.stdout)["rules"]}


def test_a_built_in_table_is_used_and_explained(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert run("quantize", mixture, "--type", "Q4_K_M", "--rules", "modern", "-o", out).returncode == 0
    types = {tensor.name: tensor.type.name for tensor in read_gguf(out).tensors}
    rules = explained(mixture, "--rules", "modern")
    assert types == {name: type for name, (type, _) in rules.items()}
    assert types["blk.1.attn_k.weight"] == "Q8_0"
    assert rules["blk.1.attn_q.weight"] == ("Q6_K", "rule 5 of modern: attention is a small part of a mixture of experts, and every token passes it")  # fmt: skip  # noqa: E501
    assert explained(mixture) == explained(mixture, "--rules", "llama.cpp") != rules


def test_a_printed_table_can_be_edited_and_passed(mixture: Path, tmp_path: Path) -> None:
    printed = run("quantize", "--print-rules", "modern").stdout
    mine = tmp_path / "mine.toml"
    mine.write_text(printed, encoding="utf-8")
    assert explained(mixture, "--rules", mine) == explained(mixture, "--rules", "modern")
    mine.write_text(printed.replace('at_least = "Q8_0"', 'at_least = "Q5_K"'), encoding="utf-8")
    assert explained(mixture, "--rules", mine)["blk.1.attn_k.weight"][0] == "Q5_K"


def test_a_wrong_table_is_one_clear_error(mixture: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('format = 1\nname = "mine"\n[[rule]]\nmatch = "x"\ntype = "Q4"\nreason = "y"\n', encoding="utf-8")
    words = ("quantize", mixture, "--type", "Q4_K_M", "-o", tmp_path / "m.gguf", "--rules")
    refused(run(*words, mine), "mine.toml: rule 1: type: unknown block type 'Q4'. Did you mean")
    refused(run(*words, "modrn"), "modrn: no such rules. Give a file, or one of: llama.cpp, modern.")
    refused(run("quantize", "--print-rules", "modrn"), "'modrn' is no built-in table. Tables: modern.")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_converting_takes_rules_too(tmp_path: Path) -> None:
    folder, mine, out = build(Case(SMALL_K), tmp_path), tmp_path / "mine.toml", tmp_path / "m.gguf"
    mine.write_text(
        'format = 1\nname = "mine"\n[[rule]]\nmatch = "ffn_up"\ntype = "base+2"\nreason = "y"\n', encoding="utf-8"
    )
    assert run("convert", folder, "--type", "Q4_K_S", "--rules", mine, "-o", out).returncode == 0
    assert {tensor.type for tensor in read_gguf(out).tensors if "ffn_up" in tensor.name} == {T.Q6_K}
