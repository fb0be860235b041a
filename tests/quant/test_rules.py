"""The frozen rules: all choices of llama.cpp's own golden files, for twelve released models from their shapes alone."""

from __future__ import annotations

import json
import math

import pytest
from gguf.constants import GGMLQuantizationType as T
from make_schema_goldens import GOLDENS, summary
from real_models import REAL_MODELS

from gguforge.quant.model import Model
from gguforge.quant.presets import PRESETS
from gguforge.quant.roles import file_order, is_quantizable
from gguforge.quant.rules import TypeChooser

GOLDEN = json.loads(GOLDENS.read_text())
BILLIONS = {
    "deepseek-v3.1": 671,
    "gemma-3-4b-it": 3.9,
    "glm-4.6v": 107,
    "gpt-oss-120b": 117,
    "meta-llama-3.1-70b-instruct": 70.6,
    "nvidia-nemotron-3-nano-30b-a3b": 31.6,
    "qwen3-0.6b": 0.75,
    "qwen3-14b": 14.8,
    "qwen3-coder-next": 79.7,
    "qwen3.5-397b-a17b": 396,
    "qwen3.6-27b": 26.9,
    "step-3.5-flash": 197,
}
"""Published sizes: a check of the rows, on which the types do not depend."""


def deviations(name: str, preset: str) -> dict[str, str]:
    """Tensors that a preset gives another type than its base."""
    model, base = REAL_MODELS[name], PRESETS[preset].base
    shapes = dict(sorted(model.shapes.items(), key=lambda item: file_order(item[0])))
    chooser = TypeChooser(PRESETS[preset], Model.from_metadata(model.metadata), list(shapes))
    types = {name: chooser.choose(name, shape, T.F32).type for name, shape in shapes.items()}
    quantizable = (name for name, shape in shapes.items() if is_quantizable(name, shape, model.architecture))
    return {name: types[name].name for name in quantizable if types[name] != base}


def test_every_golden_model_is_described() -> None:
    assert GOLDEN.keys() == REAL_MODELS.keys() == BILLIONS.keys()
    assert all(len(model["presets"]) == 33 for model in GOLDEN.values())


@pytest.mark.parametrize("name", REAL_MODELS)
def test_descriptions_agree_with_the_facts_and_sizes(name: str) -> None:
    model, facts = REAL_MODELS[name], GOLDEN[name]["facts"]
    found = Model.from_metadata(model.metadata)
    assert (found.layers, found.experts) == (facts["n_layer"], facts.get("n_expert", 0))
    assert (model.heads, model.hidden) == (facts["n_head"], facts["n_embd"])
    assert found.gqa == (facts["n_head"] // facts["n_head_kv"] if facts["n_head_kv"] else 0)
    assert facts["n_vocab"] in (model.vocabulary, 0)  # gpt-oss: not read from the file's second part
    assert sum(map(math.prod, model.shapes.values())) / 1e9 == pytest.approx(BILLIONS[name], rel=0.007)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_types_equal_llama_cpp(name: str) -> None:
    golden = GOLDEN[name]["presets"]
    assert golden == {
        preset: {"base": PRESETS[preset].base.name} | summary(deviations(name, preset)) for preset in golden
    }


def test_glm5_keeps_what_llama_cpp_keeps_there_alone() -> None:
    assert not is_quantizable("blk.0.attn_k_b.weight", (64, 512, 128), "glm5-next")
    assert is_quantizable("blk.0.attn_k_b.weight", (64, 512, 128), "deepseek2")
    names = ["output.weight", "blk.0.attn_q_a.weight"]
    chooser = TypeChooser(PRESETS["Q2_K"], Model("glm5-next", 1, 8, 64), names)
    assert chooser.choose("blk.0.attn_q_a.weight", (1536, 512), T.BF16).type == T.Q8_0
