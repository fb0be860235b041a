"""From folder to file: one pass against two, what is refused, what is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    LLAMA,
    LLAMA3_ROPE,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMALL_K,
    Case,
    build,
    like,
    safetensors,
    shapes,
    weights,
    write_shards,
)
from gguf.constants import GGMLQuantizationType as T

from gguforge.convert import convert, default_file_name, plan
from gguforge.quant.errors import CheckpointError, DataError, InputError, OutputError
from gguforge.quant.quantize import quantize


def quiet(line: str) -> None:
    """A warning that the test does not ask about."""


def refused(case: Case, folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        plan(build(case, folder), warn=quiet)
    assert "\n" not in str(caught.value)


def warnings_of(config: dict[str, Any], folder: Path, **files: Any) -> list[str]:
    lines: list[str] = []
    plan(build(Case(config, files=files), folder), warn=lines.append)
    return lines


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("preset", ["q4_k_m", "Q6_K", "q2_k", "Q8_0"])
def test_one_pass_equals_two(preset: str, dtype: str, tmp_path: Path) -> None:
    folder = build(Case(SMALL_K, dtype=dtype, shards=2), tmp_path)
    convert(folder, tmp_path / "one.gguf", type=preset, workers=1, warn=quiet)
    convert(folder, tmp_path / "auto.gguf", workers=1, warn=quiet)
    quantize(tmp_path / "auto.gguf", tmp_path / "two.gguf", preset, workers=1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_quantizing_f32_weights_does_not_round_them_to_16_bits_first(tmp_path: Path) -> None:
    folder = build(Case(SMALL_K, dtype="F32"), tmp_path)
    convert(folder, tmp_path / "one.gguf", type="Q4_K_M", workers=1, warn=quiet)
    for kind in ("F32", "AUTO"):
        convert(folder, tmp_path / f"{kind}.gguf", type=kind, workers=1, warn=quiet)
        quantize(tmp_path / f"{kind}.gguf", tmp_path / f"{kind}-q.gguf", "Q4_K_M", workers=1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "F32-q.gguf").read_bytes()
    assert (tmp_path / "one.gguf").read_bytes() != (tmp_path / "AUTO-q.gguf").read_bytes()


def test_any_number_of_workers_writes_the_same_file(tmp_path: Path) -> None:
    folder = build(Case(SMALL_K), tmp_path)
    for workers in (1, 2):
        convert(folder, tmp_path / f"{workers}.gguf", type="Q4_K_M", workers=workers, warn=quiet)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_the_plan_tells_the_exact_size(tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    made = plan(folder, "q8_0", warn=quiet)
    convert(folder, tmp_path / "out.gguf", type="q8_0", workers=1, warn=quiet)
    assert made.size == (tmp_path / "out.gguf").stat().st_size


def test_planning_reads_no_tensor_data(tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    before = plan(folder, warn=quiet)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert plan(folder, warn=quiet) == before


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    folder = build(Case(LLAMA, tokenizer="byte_level"), tmp_path)
    code = (
        "import sys; import gguforge.convert; assert 'numpy' not in sys.modules, 'the package is not lazy'\n"
        f"gguforge.convert.plan({str(folder)!r}, 'Q4_K_M')\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'click', 'llama_cpp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "near"), [("LlamaForCausaLM", "LlamaForCausalLM"), ("Qwen2MoeForCausalLM", "Qwen2ForCausalLM")]
)
def test_unknown_architecture_names_the_nearest(name: str, near: str, tmp_path: Path) -> None:
    refused(Case(like(LLAMA, architectures=[name])), tmp_path, f"'{name}' is not known.*{near}")


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [7]])
def test_architectures_must_be_named(value: object, tmp_path: Path) -> None:
    refused(Case(LLAMA | {"architectures": value}), tmp_path, "'architectures' is missing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None), ("hidden_size", "64"), ("hidden_size", -64), ("hidden_size", 64.0),
        ("hidden_size", True), ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9), ("num_attention_heads", 5), ("num_key_value_heads", 3),
        ("rms_norm_eps", "small"), ("rope_scaling", "linear"), ("hidden_act", "gelu"), ("head_dim", 15),
        ("vocab_size", 2**40), ("max_position_embeddings", [512]),
    ],
)  # fmt: skip
def test_config_fields_are_checked(field: str, value: object, tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    config = {key: item for key, item in (LLAMA | {field: value}).items() if item is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json|rope") as caught:
        plan(folder, warn=quiet)
    assert "\n" not in str(caught.value)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    refused(Case(LLAMA | {"quantization_config": {"quant_method": "awq"}}), tmp_path, "already quantized.*awq")


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    tensors = {name: weights(name, shape, "BF16") for name, shape in shapes(Case(LLAMA)).items()}
    change(tensors)
    write_shards(folder, tensors, 1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return build(Case(LLAMA), tmp_path)


def test_missing_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight': tensor is missing"):
        plan(llama)


def test_untied_model_without_output_matrix(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': tensor is missing"):
        plan(llama)


def test_wrong_shape(llama: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({name: weights(name, (64, 64), "BF16")}))
    with pytest.raises(CheckpointError, match=r"expected \[32, 64\] from config.json, found \[64, 64\]"):
        plan(llama)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "x",
    ],
)
def test_a_tensor_without_place_is_refused(llama: Path, name: str) -> None:
    rewrite(llama, lambda tensors: tensors.update({name: weights(name, (16,), "BF16")}))
    with pytest.raises(CheckpointError, match=rf"'{name}': tensor has no place in llama"):
        plan(llama)


def test_qwen3_has_no_bias_after_attention(tmp_path: Path) -> None:
    config = like(QWEN3, attention_bias=True)
    extra = {f"model.layers.{i}.self_attn.o_proj.bias": (64,) for i in range(2)}
    refused(Case(config, "byte_level", pre="qwen2", extra=extra), tmp_path, "no place in qwen3")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8"])
def test_weights_of_eight_bits(llama: Path, dtype: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({name: (dtype, (96, 64), bytes(96 * 64))}))
    if dtype == "U8":
        assert next(t for t in plan(llama).tensors if t.name == "blk.0.ffn_up.weight").source.type == T.F32
        return
    with pytest.raises(CheckpointError, match="found F8_E4M3"):
        plan(llama)


@pytest.mark.parametrize(("value", "dtype"), [("nan", "F32"), ("inf", "F32"), ("nan", "BF16"), ("-inf", "F16")])
@pytest.mark.parametrize("kind", ["AUTO", "F16", "Q8_0"])
def test_weights_that_are_no_numbers(value: str, dtype: str, kind: str, tmp_path: Path) -> None:
    folder = build(Case(LLAMA, dtype=dtype), tmp_path)
    tensors = {name: weights(name, shape, dtype) for name, shape in shapes(Case(LLAMA)).items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    bad = np.frombuffer(tensors[name][2], {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]).copy()
    bad[77] = {"BF16": 0x7FC0}.get(dtype, float(value))
    tensors[name] = (dtype, tensors[name][1], bad.tobytes())
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    with pytest.raises(DataError, match=r"blk\.1\.attn_q\.weight"):
        convert(folder, tmp_path / "out.gguf", type=kind, workers=1, warn=quiet)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "something was left behind"


def test_existing_output_is_kept(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        convert(llama, output, workers=1)
    assert output.read_text() == "precious"
    convert(llama, output, workers=1, overwrite=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_unknown_type_names_the_near_ones(llama: Path) -> None:
    with pytest.raises(InputError, match="Q4_K_M"):
        plan(llama, "Q4_K_X")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA | {"logit_scale": 0.5}, "logit_scale = 0.5 is not understood"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 has no counterpart"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not understood"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale = 0.7 is not understood"),
        (MISTRAL | {"sliding_window": 100}, "sliding_window = 100 is not applied"),
        (LLAMA | {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types = '...' is not applied"),
        (LLAMA | {"tie_word_embeddings": True}, ""),
    ],
)  # fmt: skip
def test_fields_that_change_the_result_are_reported(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    lines = warnings_of(config, tmp_path)
    assert [expected in line for line in lines] == [True] * bool(expected)


@pytest.mark.parametrize("field", ["use_sliding_window", "rope_scaling"])
def test_qwen_reports_what_its_graph_lacks(field: str, tmp_path: Path) -> None:
    value = {"use_sliding_window": True, "rope_scaling": LLAMA3_ROPE}[field]
    lines: list[str] = []
    plan(build(Case(QWEN2 | {field: value}, "byte_level", pre="qwen2"), tmp_path), warn=lines.append)
    assert len(lines) == 1


def test_harmless_fields_are_not_reported(tmp_path: Path) -> None:
    config = LLAMA | {
        "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True, "attention_dropout": 0.0,
        "initializer_range": 0.02, "pretraining_tp": 1, "rope_scaling": None, "unknown_but_unset": None,
        "mlp_bias": False, "rope_interleaved": False, "is_llama_config": True, "id2label": {"0": "a"},
        "max_window_layers": 2,
    }  # fmt: skip
    assert warnings_of(config, tmp_path) == []


def test_redundant_output_matrix_and_bias_are_reported(tmp_path: Path) -> None:
    extra = {"lm_head.weight": (320, 64)} | {f"model.layers.{i}.self_attn.o_proj.bias": (64,) for i in range(2)}
    lines: list[str] = []
    made = plan(build(Case(LLAMA | {"tie_word_embeddings": True}, extra=extra), tmp_path), warn=lines.append)
    assert [line.split(",")[0] for line in lines] == [
        "config.json ties the embeddings",
        "config.json does not set attention_bias",
    ]
    assert {"output.weight", "blk.1.attn_output.bias"} <= {tensor.name for tensor in made.tensors}


def test_default_name_follows_the_convention(tmp_path: Path) -> None:
    made = plan(build(Case(LLAMA, folder="Tiny-120K-Instruct-v0.3"), tmp_path), warn=quiet)
    assert default_file_name(made, "Q4_K_M") == "Tiny-120K-Instruct-v0.3-Q4_K_M.gguf"


def test_given_name_wins(llama: Path) -> None:
    assert plan(llama, model_name="Own").metadata["general.name"].value == "Own"
