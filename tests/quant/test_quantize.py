"""Whole files: byte for byte those of llama.cpp's own `llama_model_quantize`, for every preset and kind of model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from peer import exact, llama_quantize

from gguforge.quant.errors import DataError, InputError, OutputError
from gguforge.quant.metadata import uint32
from gguforge.quant.model import Model
from gguforge.quant.overrides import parse_overrides, parse_pairs, parse_type
from gguforge.quant.presets import ALIASES, PRESETS, find_preset
from gguforge.quant.quantize import Guide, plan_of_file, quantize, retype, types_count
from gguforge.quant.reader import read_gguf
from gguforge.quant.roles import file_order, is_quantizable
from gguforge.quant.rules import TypeChooser
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write

SHAPES = {
    "grouped heads": {"layers": 8, "ffn": 256},
    "few layers, tied": {"layers": 3, "tied": True},
    "odd rows": {"layers": 4, "hidden": 160, "ffn": 352, "heads": 4},
    "rows of no block": {"layers": 2, "hidden": 80, "ffn": 104, "heads": 4, "heads_kv": 4, "tied": True},
    "eight experts": {"layers": 4, "experts": 8, "ffn": 256},
    "four experts": {"layers": 9, "experts": 4, "ffn": 256},
}
COMMON = [name for name in PRESETS if not name.startswith(("IQ", "TQ", "Q1", "Q2_0"))]
CASES = [
    *(("grouped heads", preset) for preset in PRESETS),
    *((model, preset) for model in ("odd rows", "rows of no block") for preset in COMMON),
    *(
        (model, preset)
        for model in ("few layers, tied", "eight experts", "four experts")
        for preset in ("Q4_K_M", "Q2_K")
    ),
]
REST = [(model, preset) for model in SHAPES for preset in PRESETS if (model, preset) not in CASES]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model as a GGUF file in F16."""
    found = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("model")
        found[name] = folder / "model.gguf"
        write(models.build(folder, T.F16, **shape), found[name], workers=1)
    return found


def compare(source: Path, preset: str, folder: Path, guide: Guide | None = None) -> None:
    """Both make the same file, or both refuse. With importance, the tool adds metadata that its library does not."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    if not llama_quantize(source, theirs, preset, guide=guide):
        # Q2_K_S passes with a remark; rows too odd for Q1_0 get F16, where llama.cpp knows no way out.
        if preset not in ("Q2_K_S", "Q1_0"):
            with pytest.raises(InputError, match="needs an importance matrix"):
                quantize(source, ours, preset, guide=guide)
        return
    plan = quantize(source, ours, preset, workers=1, guide=guide)
    if guide is None:
        assert ours.read_bytes() == theirs.read_bytes()
        return
    found = read_gguf(theirs)
    assert [(t.name, t.type) for t in found.tensors] == [(t.name, t.type) for t in plan.tensors]
    assert ours.read_bytes()[len(plan.header) :] == theirs.read_bytes()[found.data_offset :]


def guide_for(source: Path) -> Guide:
    """Made-up importance for every matrix, with one expert that no token was sent to."""
    weights = {}
    for seed, tensor in enumerate(read_gguf(source).tensors):
        if len(tensor.shape) > 1 and "token_embd" not in tensor.name:
            matrices = tensor.shape[0] if len(tensor.shape) > 2 else 1
            weights[tensor.name] = np.square(models.weights(seed, (matrices, tensor.shape[-1])) * np.float32(50))
            if matrices > 1:
                weights[tensor.name][1] = 1
    return Guide(weights, "imatrix.gguf", "text", 7)


@exact
@pytest.mark.parametrize(("model", "preset"), CASES)
def test_file_equals_llama_quantize(preset: str, model: str, written: dict[str, Path], tmp_path: Path) -> None:
    compare(written[model], preset, tmp_path)


@exact
@pytest.mark.slow
@pytest.mark.parametrize(("model", "preset"), REST)
def test_file_equals_llama_quantize_for_the_rest(
    preset: str, model: str, written: dict[str, Path], tmp_path: Path
) -> None:
    compare(written[model], preset, tmp_path)


@exact
@pytest.mark.parametrize("preset", ["Q4_K_M", "Q4_0", "IQ2_M", "Q2_K_S"])
def test_file_with_importance_equals_llama_quantize(preset: str, written: dict[str, Path], tmp_path: Path) -> None:
    compare(written["grouped heads"], preset, tmp_path, guide_for(written["grouped heads"]))


@exact
@pytest.mark.slow
@pytest.mark.parametrize("model", ["grouped heads", "odd rows", "eight experts", "four experts"])
@pytest.mark.parametrize("preset", PRESETS)
def test_file_with_importance_equals_llama_quantize_for_the_rest(
    preset: str, model: str, written: dict[str, Path], tmp_path: Path
) -> None:
    compare(written[model], preset, tmp_path, guide_for(written[model]))


def test_importance_of_another_model_is_refused(written: dict[str, Path]) -> None:
    plan = plan_of_file(read_gguf(written["grouped heads"]))
    for values, words in ((np.ones((1, 999), np.float32), "another model"),):
        with pytest.raises(InputError, match=words):
            retype(plan, "Q4_K_M", guide=Guide({"blk.0.attn_q.weight": values}, "imatrix.gguf"))


def test_overrides(written: dict[str, Path]) -> None:
    plan = plan_of_file(read_gguf(written["grouped heads"]))

    def types(**wanted: Any) -> dict[str, T]:
        words = wanted.pop("words", ())
        return {t.name: t.type for t in retype(plan, "Q4_K_M", overrides=parse_overrides(words, **wanted)).tensors}

    assert set(types(pure=True).values()) == {T.Q4_K, T.F32}
    assert types(keep_output=True)["output.weight"] == T.F16
    assert types(output="q8_0", embedding="q3_k")["output.weight"] == T.Q8_0
    assert types(output="q8_0", embedding="q3_k")["token_embd.weight"] == T.Q3_K
    named = types(words=["ffn_(up|gate)=iq4_nl", "ffn=Q8_0"])
    assert named["blk.3.ffn_up.weight"] == T.IQ4_NL
    assert named["blk.3.ffn_down.weight"] == T.Q8_0


@pytest.mark.parametrize("word", ["ffn_up", "=Q8_0", "ffn_up=", "ffn_up=Q8", "(=Q8_0"])
def test_bad_override_is_one_clear_error(word: str) -> None:
    with pytest.raises(InputError):
        parse_overrides([word])


@pytest.mark.parametrize(
    "word", ["key", "key=int", "key=int:x", "key=bool:1", "=int:1", "key=list:1", "key=int:9999999999"]
)
def test_bad_metadata_is_one_clear_error(word: str) -> None:
    with pytest.raises(InputError, match="is no metadata"):
        parse_pairs([word])


def test_metadata_overrides_stand_at_the_end(written: dict[str, Path]) -> None:
    pairs = parse_pairs(["general.name=str:New", "a.flag=bool:true", "a.count=int:-3", "a.part=float:0.5"])
    made = retype(plan_of_file(read_gguf(written["odd rows"])), "Q8_0", metadata=pairs).metadata
    assert list(made)[-4:] == ["general.name", "a.flag", "a.count", "a.part"]
    assert [value.value for value in made.values()][-4:] == ["New", True, 3, 0.5]


def test_the_rules_go_by_overridden_metadata(written: dict[str, Path]) -> None:
    """As in llama-quantize, whose loader reads the overrides too."""
    plan = plan_of_file(read_gguf(written["grouped heads"]))
    made = retype(plan, "Q4_K_M", metadata=parse_pairs(["llama.block_count=int:16"]))
    better = [t.name for t in made.tensors if t.type == T.Q6_K and "ffn_down" in t.name]
    assert better == [f"blk.{i}.ffn_down.weight" for i in (0, 1, 4, 7)]  # an eighth of 16 layers, and every third


def test_a_copy_without_file_type_gets_a_guess(written: dict[str, Path], tmp_path: Path) -> None:
    plan = retype(plan_of_file(read_gguf(written["grouped heads"])), "Q4_K_M")
    bare = {key: value for key, value in plan.metadata.items() if key != "general.file_type"}
    source, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("source", "ours", "theirs"))
    write(replace(plan, metadata=bare), source, workers=1)
    quantize(source, ours, "copy")
    assert llama_quantize(source, theirs, "COPY")
    assert ours.read_bytes() == theirs.read_bytes()
    assert read_gguf(ours).metadata["general.file_type"] == uint32(1024 + 15)


@exact
@pytest.mark.parametrize("stored", [T.F32, T.BF16], ids=["F32", "BF16"])
def test_file_equals_llama_quantize_from_other_types(stored: T, tmp_path: Path) -> None:
    source, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("source", "ours", "theirs"))
    write(models.build(tmp_path, stored, layers=3), source, workers=1)
    for preset in ("Q4_K_M", "Q5_0"):
        quantize(source, ours, preset, workers=1, overwrite=True)
        assert llama_quantize(source, theirs, preset)
        assert ours.read_bytes() == theirs.read_bytes()


def test_workers_do_not_change_the_file(written: dict[str, Path], tmp_path: Path) -> None:
    files = []
    for workers in (1, 2, 3):
        path = tmp_path / f"{workers}.gguf"
        seen: list[int] = []
        plan = quantize(written["grouped heads"], path, "Q4_K_M", workers=workers, progress=seen.append)
        files.append(path.read_bytes())
        assert sum(seen) == sum(tensor.nbytes for tensor in plan.tensors)
    assert files[0] == files[1] == files[2]


def test_q2_k_s_follows_the_rules(written: dict[str, Path], tmp_path: Path) -> None:
    plan = quantize(written["grouped heads"], tmp_path / "q.gguf", "Q2_K_S")
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    assert types["blk.0.ffn_down.weight"] == T.Q4_K  # the first eighth of the layers
    assert types["blk.5.ffn_down.weight"] == T.Q2_K
    assert types["blk.5.attn_v.weight"] == T.Q4_K  # four query heads share a value head
    assert types["output.weight"] == T.Q6_K


def test_planning_is_pure_and_dry(written: dict[str, Path]) -> None:
    source = read_gguf(written["odd rows"])
    plan = retype(plan_of_file(source), "Q4_K_M")
    assert plan == retype(plan_of_file(source), find_preset("q4_k"))
    fallen = {tensor.name: (tensor.fallback, tensor.type) for tensor in plan.tensors if tensor.fallback is not None}
    assert fallen["blk.0.attn_q.weight"] == (T.Q4_K, T.Q5_0)
    assert fallen["blk.0.ffn_down.weight"][1] in (T.Q5_0, T.Q8_0)
    assert all("blocks" in tensor.reason for tensor in plan.tensors if tensor.fallback is not None)
    assert sum(count for count, _ in types_count(plan).values()) == len(plan.tensors)


def test_retyping_twice_is_retyping_once(written: dict[str, Path]) -> None:
    plan = plan_of_file(read_gguf(written["grouped heads"]))
    assert retype(retype(plan, "BF16"), "Q4_K_M").header == retype(plan, "Q4_K_M").header


def test_quantized_input_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    quantize(written["grouped heads"], small, "Q8_0")
    with pytest.raises(InputError, match="already quantized to Q8_0") as caught:
        quantize(small, tmp_path / "smaller.gguf", "Q4_K_M")
    assert caught.value.tensor == "output.weight"
    quantize(small, tmp_path / "smaller.gguf", "Q4_K_M", allow_requantize=True)


def test_nan_names_its_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    plan = models.build(tmp_path, T.F32, layers=2)
    bad = models.weights(1, (256, 256))
    bad[77, 5] = np.nan
    broken = tuple(
        replace(tensor, source=ArraySource(bad)) if tensor.name == "blk.1.attn_q.weight" else tensor
        for tensor in plan.tensors
    )
    for preset in ("F32", "Q4_K_M", "F16"):
        for workers in (1, 2):
            with pytest.raises(DataError, match=r"blk\.1\.attn_q\.weight.*NaN or infinity"):
                write(retype(replace(plan, tensors=broken), preset), tmp_path / "out.gguf", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_values_beyond_f16_are_refused(tmp_path: Path) -> None:
    plan = models.build(tmp_path, T.F32, layers=1)
    large = ArraySource(np.full((256, 256), 70000, np.float32))
    tensors = tuple(replace(t, source=large) if t.name == "blk.0.attn_q.weight" else t for t in plan.tensors)
    with pytest.raises(DataError, match="too large for F16"):
        write(retype(replace(plan, tensors=tensors), "F16"), tmp_path / "out.gguf")


def test_output_on_input_is_refused(written: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(written["odd rows"])
    with pytest.raises(OutputError, match="same file"):
        quantize(written["odd rows"], link, "Q8_0", overwrite=True)


def test_presets_by_name_alias_number_and_any_case() -> None:
    assert {find_preset(alias).name for alias in ALIASES} == {"Q3_K_M", "Q4_K_M", "Q5_K_M"}
    for preset in PRESETS.values():
        assert find_preset(preset.name.lower()) == find_preset(str(int(preset.file_type))) == preset
    with pytest.raises(InputError, match="Did you mean Q4_K_M"):
        find_preset("Q4_KM")
    with pytest.raises(InputError, match="Known: F32"):
        find_preset("zzz")
    with pytest.raises(InputError, match=r"no type has the number 6\. Known: 0 F32, 1 F16"):
        find_preset("6")
    with pytest.raises(InputError, match=r"unknown block type 'ZZ'\. Known: BF16, F16"):
        parse_type("ZZ")


def types_of(preset: str, model: Model, names: list[str], row_length: int = 256) -> dict[str, T]:
    chooser = TypeChooser(find_preset(preset), model, names)
    return {name: chooser.choose(name, (256, row_length), T.F16).type for name in sorted(names, key=file_order)}


def test_the_70b_rule_lifts_values() -> None:
    names = ["output.weight", *(f"blk.{i}.attn_v.weight" for i in range(80))]
    large = types_of("Q4_K_M", Model("llama", 80, 8, 0), names)
    small = types_of("Q4_K_M", Model("llama", 79, 8, 0), names)
    assert large["blk.11.attn_v.weight"] == T.Q5_K
    assert small["blk.11.attn_v.weight"] == T.Q4_K
    assert types_of("Q4_K_M", Model("qwen2", 80, 1, 0), names)["blk.11.attn_v.weight"] == T.Q5_K


def test_falcon_keeps_its_own_rules() -> None:
    names = [f"blk.{i}.ffn_down.weight" for i in range(32)] + [f"blk.{i}.attn_output.weight" for i in range(32)]
    types = types_of("Q4_K_M", Model("falcon", 32, 8, 0), ["output.weight", *names])
    assert types["output.weight"] == T.Q8_0
    assert [types[f"blk.{i}.ffn_down.weight"] for i in (0, 2, 4, 6)] == [T.Q6_K, T.Q5_K, T.Q4_K, T.Q5_K]
    assert types_of("Q3_K_L", Model("falcon", 32, 8, 0), names)["blk.0.attn_output.weight"] == T.Q4_K


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_q.bias",
        "position_embd.weight",
        "blk.1.ssm_conv1d.weight",
    ],
)
def test_some_tensors_are_never_quantized(name: str) -> None:
    assert not is_quantizable(name, (64, 256))
    assert not is_quantizable("blk.0.attn_q.weight", (256,))
    assert not is_quantizable("blk.0.attn_q.weight", (1, 256))


def test_a_file_without_architecture_is_no_model(tmp_path: Path) -> None:
    plan = models.build(tmp_path, T.F16, layers=1)
    bare = replace(plan, metadata={"general.file_type": uint32(1)})
    with pytest.raises(InputError, match=r"no general\.architecture"):
        retype(bare, "Q4_K_M")
