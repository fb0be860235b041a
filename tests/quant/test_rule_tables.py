"""Rule tables: how they are read, what they decide, and what the built-in one does to released models."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st
from real_models import REAL_MODELS

from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.errors import InputError
from gguforge.quant.layer_sets import parse_layer_set
from gguforge.quant.model import Model
from gguforge.quant.overrides import parse_overrides
from gguforge.quant.presets import PRESETS
from gguforge.quant.roles import file_order
from gguforge.quant.rule_files import BUILT_IN, find_rules, read_rules, rules_text
from gguforge.quant.rule_tables import LADDERS, RuleTable, bits, climb
from gguforge.quant.rules import Overrides, TypeChooser

PAGE = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
PLAIN_DENSE = ("gemma-3-4b-it", "meta-llama-3.1-70b-instruct", "qwen3-0.6b", "qwen3-14b")
TITLES = {
    "DeepSeek V3.1": "deepseek-v3.1",
    "GLM 4.6V": "glm-4.6v",
    "gpt-oss 120B": "gpt-oss-120b",
    "Nemotron 3 Nano 30B-A3B": "nvidia-nemotron-3-nano-30b-a3b",
    "Qwen3 Coder Next": "qwen3-coder-next",
    "Qwen3.5 397B-A17B": "qwen3.5-397b-a17b",
    "Qwen3.6 27B (dense, hybrid)": "qwen3.6-27b",
    "Step 3.5 Flash": "step-3.5-flash",
}
GUIDED = ("IQ3_XXS", "IQ4_XS", "Q4_0")  # their mixes ask for an importance matrix
PLAIN = Overrides()
HEAD = 'format = 1\nname = "mine"\n'
ROLES = "[roles]\ndown = 'ffn_down'\n"


def table(rules: str, head: str = HEAD) -> RuleTable:
    return read_rules(head + rules, "mine.toml")


def rule(body: str, match: str = "match = 'ffn_down'") -> str:
    return f"[[rule]]\n{match}\n{body}\nreason = 'because'\n"


@cache
def in_file_order(name: str) -> dict[str, tuple[int, ...]]:
    return dict(sorted(REAL_MODELS[name].shapes.items(), key=lambda item: file_order(item[0])))


def types(
    name: str, preset: str, overrides: Overrides = PLAIN, importance: bool = False, stored: T = T.BF16
) -> dict[str, tuple[T, str]]:
    """Type and reason of each tensor of a released model."""
    model = REAL_MODELS[name]
    shapes = in_file_order(name)
    facts = Model.from_metadata(model.metadata)
    chooser = TypeChooser(PRESETS[preset], facts, list(shapes), overrides, importance)
    chosen = {name: chooser.choose(name, shape, stored) for name, shape in shapes.items()}
    return {name: (choice.type, choice.reason) for name, choice in chosen.items()}


def with_table(rules: str, head: str = HEAD, model: str = "qwen3-0.6b", preset: str = "Q4_K_M") -> dict[str, T]:
    found = types(model, preset, Overrides(table=table(rules, head)))
    return {name: type for name, (type, _) in found.items()}


def down(types: dict[str, T]) -> list[T]:
    return [types[f"blk.{i}.ffn_down.weight"] for i in range(28)]


@pytest.mark.parametrize("name", REAL_MODELS)
def test_modern_rules_only_lift_and_leave_plain_dense_models_alone(name: str) -> None:
    modern = Overrides(table=find_rules("modern"))
    cases = [*((preset, False) for preset in PRESETS), *((preset, True) for preset in GUIDED)]
    lifted = set()
    for preset, importance in cases:
        before, after = types(name, preset, PLAIN, importance), types(name, preset, modern, importance)
        for tensor, (type, _) in before.items():  # F16: rows that no block of llama.cpp's choice fits
            assert bits(after[tensor][0]) >= bits(type) or type == T.F16, (preset, tensor)
        lifted |= {tensor for tensor in before if after[tensor][0] != before[tensor][0]}
        assert name not in PLAIN_DENSE or before == after
    assert bool(lifted) == (name not in PLAIN_DENSE)
    assert not any("_exps" in tensor for tensor in lifted)  # the bulk of the weights stays as it is


def test_modern_rules_on_deepseek() -> None:
    found = types("deepseek-v3.1", "Q2_K", Overrides(table=find_rules("modern")))
    assert found["blk.3.ffn_down_shexp.weight"][0] == T.Q4_K
    assert found["blk.0.ffn_up.weight"][0] == T.Q4_K
    assert found["blk.9.attn_kv_a_mqa.weight"][0] == found["blk.9.attn_k_b.weight"][0] == T.Q8_0
    assert found["blk.9.ffn_gate_exps.weight"] == (T.Q2_K, "feed-forward up or gate")
    assert found["blk.9.attn_output.weight"][1].startswith("rule 5 of modern: attention is a small part")
    lifted = types("deepseek-v3.1", "Q6_K", Overrides(table=find_rules("modern")))
    assert lifted["blk.9.attn_output.weight"][0] == T.Q8_0  # the top of the ladder


def test_modern_rules_on_a_pure_state_space_model() -> None:
    shapes = {f"blk.{i}.ssm_{part}.weight": (256, 512) for i in range(16) for part in ("in", "out", "x")}
    chooser = TypeChooser(
        PRESETS["Q4_K_M"], Model("mamba2", 16, 0, 0), list(shapes), Overrides(table=find_rules("modern"))
    )
    found = {name: chooser.choose(name, shape, T.F16).type for name, shape in shapes.items()}
    assert [i for i in range(16) if found[f"blk.{i}.ssm_out.weight"] == T.Q6_K] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {found[f"blk.{i}.ssm_in.weight"] for i in range(16)} == {T.Q4_K}
    assert {found[f"blk.{i}.ssm_x.weight"] for i in range(16)} == {T.Q8_0}


def test_the_examples_of_the_page_are_tables() -> None:
    example, mix = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert len(read_rules(example, "example").rules) == 1
    written = with_table(mix, head="")
    assert written == {name: type for name, (type, _) in types("qwen3-0.6b", "Q4_K_M").items()}


def test_the_ladders_of_the_page_are_the_ladders() -> None:
    lines = "\n".join("    " + "  ".join(type.name for type in ladder) for ladder in LADDERS)
    assert f"\n\n{lines}\n\n" in PAGE


def test_the_page_numbers_the_rules() -> None:
    modern = find_rules("modern")
    assert modern is not None
    numbers = re.findall(r"^\| (\d+(?:, \d+)*) \|", PAGE, re.MULTILINE)
    assert [int(n) for words in numbers for n in words.split(", ")] == [rule.number for rule in modern.rules]


def size(name: str, preset: str, overrides: Overrides) -> float:
    """Bytes of a released model's tensors."""
    shapes = REAL_MODELS[name].shapes
    chosen = types(name, preset, overrides, importance=True, stored=T.F16)
    sizes = {
        tensor: GGML_QUANT_SIZES[type if len(shapes[tensor]) > 1 else T.F32] for tensor, (type, _) in chosen.items()
    }
    return sum(math.prod(shapes[tensor]) / size * nbytes for tensor, (size, nbytes) in sizes.items())


def test_the_page_tells_what_modern_costs() -> None:
    head, *rows = re.findall(r"^\| (.*?) \| (.*) \|$", PAGE[PAGE.index("| model | IQ2") :], re.MULTILINE)
    presets, modern = head[1].split(" | "), Overrides(table=find_rules("modern"))
    written = {title: cells for title, cells in rows if title in TITLES}
    assert written.keys() == TITLES.keys()
    for title, name in TITLES.items():
        growth = [100 * (size(name, preset, modern) / size(name, preset, PLAIN) - 1) for preset in presets]
        assert written[title] == " | ".join(f"{percent:.1f}" for percent in growth)


def test_the_first_rule_that_applies_decides() -> None:
    text = rule('layers = "0-3"\ntype = "Q8_0"') + rule('type = "Q5_K"') + rule('type = "Q2_K"')
    assert down(with_table(text)) == [T.Q8_0] * 4 + [T.Q5_K] * 24


@pytest.mark.parametrize(
    ("body", "first", "fourth"),  # Q4_K_M lifts the first feed-forward down to Q6_K, and not the fourth
    [
        ('type = "base+1"', T.Q5_K, T.Q5_K),
        ('type = "base-1"', T.Q3_K, T.Q3_K),
        ('type = "base"', T.Q4_K, T.Q4_K),
        ('type = "keep"', T.BF16, T.BF16),
        ('type = "iq4_xs"', T.IQ4_XS, T.IQ4_XS),
        ('at_least = "base+1"', T.Q6_K, T.Q5_K),
        ('at_most = "Q5_K"', T.Q5_K, T.Q4_K),
        ('at_least = "Q5_K"\nat_most = "Q5_K"', T.Q5_K, T.Q5_K),
        ('type = "Q8_0"\nwhen = { experts = 0, gqa = ">= 2", layers = "< 29", tied = false }', T.Q8_0, T.Q8_0),
        ('type = "Q8_0"\nwhen = { architecture = ["llama", "qwen*"] }', T.Q8_0, T.Q8_0),
        ('type = "Q8_0"\nwhen = { experts = "> 1" }', T.Q6_K, T.Q4_K),
        ('type = "Q8_0"\nwhen = { importance = true }', T.Q6_K, T.Q4_K),
        ('type = "Q8_0"\npresets = "q4_k_*"', T.Q8_0, T.Q8_0),
        ('type = "Q8_0"\npresets = ["Q2*", "IQ*"]', T.Q6_K, T.Q4_K),
    ],
)  # fmt: skip
def test_decisions_and_conditions(body: str, first: T, fourth: T) -> None:
    found = down(with_table(rule(body)))
    assert (found[0], found[4]) == (first, fourth)
    assert down(with_table(ROLES + rule(body, "role = 'down'"))) == found
    assert down(with_table(ROLES + rule(body, "role = ['down']"))) == found


def test_fallbacks_overrides_and_pure_stand_above_the_table() -> None:
    kept = table(rule('type = "Q6_K"', "match = 'ffn'"))
    assert types("glm-4.6v", "Q4_K_M", Overrides(table=kept))["blk.3.ffn_down_exps.weight"][0] == T.Q8_0  # rows of 1408
    named = parse_overrides(["ffn_up=Q2_K"], table=kept)
    found = types("qwen3-0.6b", "Q4_K_M", named)
    assert (found["blk.3.ffn_up.weight"][0], found["blk.3.ffn_gate.weight"][0]) == (T.Q2_K, T.Q6_K)
    pure = types("qwen3-0.6b", "Q4_K_M", Overrides(pure=True, table=kept))
    assert {type for type, _ in pure.values()} == {T.Q4_K, T.BF16}  # BF16: norms, kept


def test_reasons_name_the_rule() -> None:
    found = types("qwen3-0.6b", "Q4_K_M", Overrides(table=table(rule('at_least = "Q6_K"'))))
    assert found["blk.4.ffn_down.weight"] == (T.Q6_K, "rule 1 of mine: because")
    assert found["blk.0.ffn_down.weight"] == (T.Q6_K, "feed-forward down; rule 1 of mine asks no more")
    assert found["blk.0.ffn_up.weight"] == (T.Q4_K, "feed-forward up or gate")


def test_types_on_no_ladder_are_left_to_the_mix() -> None:
    for preset in ("TQ2_0", "MXFP4_MOE", "F16"):
        assert with_table(rule('at_least = "base+2"'), preset=preset) == {
            name: type for name, (type, _) in types("qwen3-0.6b", preset).items()
        }


@given(st.sampled_from(sorted({type for ladder in LADDERS for type in ladder})), st.integers(-9, 9))
def test_climbing_never_goes_the_wrong_way(base: T, steps: int) -> None:
    found, further = climb(base, steps), climb(base, steps + 1)
    assert found is not None
    assert further is not None
    assert bits(found) <= bits(further)
    assert climb(base, 0) == base


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("first 1/8", [0]), ("first 3", [0, 1, 2]), ("last 1/4", [7, 8, 9]), ("last 2", [8, 9]), ("every 3", [2, 5, 8]),
        ("every 2 from 5", [6, 8]), ("4", [4]), ("3 - 5", [3, 4, 5]), ("nextn", [10, 11]), ("every 1", list(range(10))),
    ],
)  # fmt: skip
def test_layer_sets(text: str, layers: list[int]) -> None:
    holds, model = parse_layer_set(text), Model("a", 12, 1, 0, nextn=2)
    assert [i for i in range(12) if holds(i, model)] == layers


def test_a_tensor_outside_the_layers_is_in_no_layer_set() -> None:
    assert with_table(rule('layers = "first 99"\ntype = "Q2_K"', "match = 'weight'"))["output.weight"] == T.Q6_K


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format = 1", "name is missing"),
        ('name = "x"', "format is missing"),
        ('format = 2\nname = "x"', "format is not understood.*expected 1, found 2"),
        ("format = 1 2", "rules are no TOML.*line 1"),
        (HEAD + "rules = []", "unknown key 'rules'.*Did you mean rule"),
        (HEAD + "otherwise = 'mix'", "otherwise is not understood"),
        (HEAD + "[roles]\na = '('", "roles: a is no regular expression"),
        (HEAD + "[[rule]]\nmatch = 'a'\ntype = 'Q8_0'", "rule 1: reason is missing"),
        (HEAD + "rule = [1]", "rule 1: reason is missing"),
        (HEAD + "[[rule]]\nmatch = 'a'\ntype = 'Q8_0'\nreason = ' '", "rule 1: reason is empty"),
        (HEAD + rule("type = 'Q8_0'", ""), "rule 1: needs either role or match"),
        (HEAD + rule("type = 'Q8_0'", "role = 'a'"), "rule 1: no role 'a'"),
        (HEAD + rule("type = 'Q8_0'", "role = []"), "rule 1: role has the wrong kind"),
        (HEAD + rule("type = 'Q8_0'", "match = '('"), "rule 1: match is no regular expression"),
        (HEAD + rule("type = 'Q8'"), "rule 1: type: unknown block type 'Q8'.*Did you mean"),
        (HEAD + rule("type = 6"), "rule 1: type has the wrong kind.*expected str, found int"),
        (HEAD + rule("at_least = 'keep'"), "rule 1: at_least: unknown block type 'keep'"),
        (HEAD + rule(""), "rule 1: no single decision"),
        (HEAD + rule("type = 'Q8_0'\nat_least = 'Q8_0'"), "rule 1: no single decision"),
        (HEAD + rule("type = 'Q8_0'") + rule("typ = 'Q8_0'"), "rule 2: unknown key 'typ'.*Did you mean type"),
        (HEAD + rule("type = 'Q8_0'\nlayers = 'first 1/0'"), "rule 1: layers 'first 1/0' are not understood"),
        (HEAD + rule("type = 'Q8_0'\nlayers = '5-3'"), "rule 1: layers '5-3' are not understood"),
        (HEAD + rule("type = 'Q8_0'\npresets = 'Q9*'"), "rule 1: no preset is named"),
        (
            HEAD + rule("type = 'Q8_0'\nwhen = { expert = 2 }"),
            "rule 1: when: unknown key 'expert'.*Did you mean experts",
        ),
        (HEAD + rule("type = 'Q8_0'\nwhen = { experts = 'some' }"), "rule 1: when: experts is not understood"),
        (HEAD + rule("type = 'Q8_0'\nwhen = { tied = 1 }"), "rule 1: when: tied has the wrong kind"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"^mine\.toml: {words}"):
        read_rules(text, "mine.toml")


def test_finding_rules(tmp_path: Path) -> None:
    assert find_rules("llama.cpp") is None
    copy = tmp_path / "copy.toml"
    for name in BUILT_IN:
        copy.write_text(rules_text(name), encoding="utf-8")
        found, built_in = find_rules(str(copy)), find_rules(name)
        assert found is not None
        assert built_in is not None
        assert [rule.reason for rule in found.rules] == [rule.reason for rule in built_in.rules]
    with pytest.raises(InputError, match=r"no such rules.*llama\.cpp, modern"):
        find_rules(str(tmp_path / "modrn"))
    with pytest.raises(InputError, match="cannot be read"):
        find_rules(str(tmp_path))
    copy.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        find_rules(str(copy))
    with pytest.raises(InputError, match="no built-in table"):
        rules_text("llama.cpp")
