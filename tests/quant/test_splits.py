"""Split models: the very files of llama.cpp, and what is refused when files do not belong together."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st
from peer import exact, llama_quantize
from plans import plans

from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import DataError, GGUFError, InputError, OutputError
from gguforge.quant.metadata import Value, int32, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.quantize import plan_of_file, quantize, retype
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.splits import (
    COUNT,
    NUMBER,
    SPLIT_KEYS,
    TENSORS,
    Limits,
    divide,
    named,
    parse_size,
    part_name,
    read_model,
)
from gguforge.quant.writer import write, write_all

SHAPES = {
    "grouped heads": {"layers": 4, "ffn": 256},
    "odd rows": {"layers": 3, "hidden": 160, "ffn": 352, "heads": 4},
    "eight experts": {"layers": 3, "experts": 8, "ffn": 256},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model in one file, F16."""
    found = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("model")
        found[name] = folder / "m.gguf"
        write(models.build(folder, T.F16, **shape), found[name], workers=1)
    return found


@pytest.fixture(scope="module")
def split(whole: dict[str, Path]) -> dict[str, Path]:
    """Each model in files of 16 tensors, so many that pruning empties none: the first of them."""
    return {name: cut(path, 16)[0] for name, path in whole.items()}


def cut(path: Path, tensors: int) -> list[Path]:
    """A model's files with so many tensors each."""
    made = named(divide(plan_of_file(read_gguf(path)), Limits(tensors=tensors)), path)
    write_all(made, workers=1)
    return [part for part, _ in made]


def contents(folder: Path, start: str) -> dict[str, bytes]:
    """The files whose names begin so, by the rest of the name."""
    return {path.name.removeprefix(start): path.read_bytes() for path in folder.glob(f"{start}*")}


def same_files(source: Path, preset: str, folder: Path, prune: tuple[int, ...], keep_split: bool) -> int:
    """Both make the same files; returns how many."""
    theirs = folder / ("theirs" if keep_split else "theirs.gguf")
    assert llama_quantize(source, theirs, preset, prune=prune, keep_split=keep_split)
    quantize(source, folder / "ours.gguf", preset, workers=1, prune=prune, keep_split=keep_split)
    made = contents(folder, "ours")
    assert made == contents(folder, "theirs")
    return len(made)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("prune", [(), (0,), (1, 2)], ids=str)
def test_copies_equal_those_of_llama_quantize(
    model: str, prune: tuple[int, ...], whole: dict[str, Path], split: dict[str, Path], tmp_path: Path
) -> None:
    for number, (source, keep) in enumerate(((whole, False), (split, False), (split, True))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert (same_files(source[model], "COPY", folder, prune, keep) > 1) == keep


@exact
@pytest.mark.parametrize("preset", ["Q4_K_M", "Q2_K", "Q8_0"])
@pytest.mark.parametrize("prune", [(), (1,), (0, 3)], ids=str)
def test_kept_splits_equal_those_of_llama_quantize(
    preset: str, prune: tuple[int, ...], split: dict[str, Path], tmp_path: Path
) -> None:
    """The rules go by the order of the files, and by the number of layers there were before pruning."""
    assert same_files(split["grouped heads"], preset, tmp_path, prune, keep_split=True) > 1


def test_a_file_that_loses_all_its_tensors_goes(whole: dict[str, Path], tmp_path: Path) -> None:
    """llama-quantize dies of it."""
    shutil.copy(whole["grouped heads"], tmp_path / "m.gguf")
    first, *others = cut(tmp_path / "m.gguf", 3)
    quantize(first, tmp_path / "pruned.gguf", "COPY", prune=[1], keep_split=True)
    made = sorted(tmp_path.glob("pruned*"))
    assert len(made) == len(others) + 1 - 2  # two files held nothing but tensors of layer 1
    plan = retype(plan_of_file(read_gguf(whole["grouped heads"])), "COPY", prune=[1], keep_order=True)
    assert plan_of_file(read_model(made[0])).header == plan.header


def test_merging_gives_back_the_whole(whole: dict[str, Path], split: dict[str, Path], tmp_path: Path) -> None:
    for model, path in split.items():
        file = read_model(path)
        write(plan_of_file(file), tmp_path / f"{model}.gguf", workers=1)
        assert (tmp_path / f"{model}.gguf").read_bytes() == whole[model].read_bytes()
        assert file.size == sum(part.stat().st_size for part in path.parent.glob("m-*"))
        assert len(file.splits) == len(list(path.parent.glob("m-*")))


@pytest.mark.parametrize("limits", [{"split_max_tensors": 2}, {"split_max_size": 1100}, {"split_max_size": 1 << 20}])
def test_limits_of_the_converter_are_those_of_gguf_py(limits: dict[str, int], tmp_path: Path) -> None:
    arrays = {f"t{i}": models.weights(i, (4, 3 * i + 1)) for i in range(12)}  # of odd sizes, so that padding tells
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama", **limits)
    writer.add_uint32("llama.block_count", 3)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {"general.architecture": string("llama"), "llama.block_count": uint32(3)}
    plan = Plan(metadata, tuple(TensorPlan(n, a.shape, T.F32, ArraySource(a)) for n, a in arrays.items()))
    wanted = Limits(limits.get("split_max_size"), limits.get("split_max_tensors"), by_converter=True)
    write_all(named(divide(plan, wanted), tmp_path / "ours.gguf"), workers=1)
    assert contents(tmp_path, "ours") == contents(tmp_path, "theirs")


@pytest.mark.skipif(shutil.which("llama-gguf-split") is None, reason="llama-gguf-split is not installed")
@pytest.mark.parametrize("limit", [("--split-max-size", "1M"), ("--split-max-tensors", "4")])
def test_files_equal_those_of_llama_gguf_split(limit: tuple[str, str], whole: dict[str, Path], tmp_path: Path) -> None:
    option, text = limit
    wanted = Limits(nbytes=parse_size(text)) if option.endswith("size") else Limits(tensors=int(text))
    for model, path in whole.items():
        folder = tmp_path / model
        folder.mkdir()
        words = ["llama-gguf-split", *limit, path, folder / "theirs"]
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
        write_all(named(divide(plan_of_file(read_gguf(path)), wanted), folder / "ours.gguf"), workers=1)
        assert contents(folder, "ours") == contents(folder, "theirs")


@given(plans(), st.integers(1, 3), st.integers(1, 500), st.booleans())
def test_dividing_loses_nothing(plan: Plan, tensors: int, nbytes: int, by_converter: bool) -> None:
    made = divide(plan, Limits(nbytes, tensors, by_converter))
    assert tuple(tensor for part in made for tensor in part.tensors) == plan.tensors
    if len(made) == 1:
        assert made == (plan,)
        return
    for number, part in enumerate(made):
        assert 1 <= len(part.tensors) <= tensors
        assert len(part.tensors) == 1 or sum(tensor.nbytes for tensor in part.tensors) <= nbytes
        values = {key: part.metadata[key] for key in SPLIT_KEYS}
        assert [value.value for value in values.values()] == [number, len(made), len(plan.tensors)]
        kinds = [GGUFValueType.UINT16, GGUFValueType.UINT16, GGUFValueType.INT32]
        assert [value.kind for value in values.values()] == kinds
        rest = {key: value for key, value in part.metadata.items() if key not in values}
        assert rest == ({} if number else plan.metadata)
        assert list(part.metadata)[-3:] == (list(SPLIT_KEYS) if by_converter else [NUMBER, TENSORS, COUNT])


def test_more_files_than_the_format_counts() -> None:
    one = models.weights(0, (1, 1))
    tensors = tuple(TensorPlan(f"t{i}", one.shape, T.F32, ArraySource(one)) for i in range(65536))
    with pytest.raises(InputError, match=r"65536 files.*at most 65535"):
        divide(Plan({}, tensors), Limits(tensors=1))


def test_sizes_and_names() -> None:
    assert [parse_size(text) for text in ("7", "2k", " 500M ", "3G")] == [7, 2000, 500_000_000, 3_000_000_000]
    assert [parse_size(text) for text in ("1.5G", "2T", "8 GB", "1.5KiB")] == [
        1_500_000_000,
        2 * 10**12,
        8 * 10**9,
        1536,
    ]
    for text in ("", "0", "-1", "G", "2X", "1..5G", "1e9", "2GG"):
        with pytest.raises(InputError, match="is no size"):
            parse_size(text)
    for name in ("m.gguf", "m-00002-of-00009.gguf", "m"):
        assert part_name(Path("dir") / name, 2, 3) == Path("dir/m-00003-of-00003.gguf")


Files = dict[int, Path]


def rewrite(path: Path, changes: Mapping[str, Value | None]) -> None:
    """Change metadata of a file; None takes a key away."""
    plan = plan_of_file(read_gguf(path))
    metadata = {key: value for key, value in plan.metadata.items() if key not in changes}
    metadata |= {key: value for key, value in changes.items() if value is not None}
    changed = path.with_suffix(".changed")
    write(replace(plan, metadata=metadata), changed, workers=1)
    changed.replace(path)


def swap(files: Files) -> None:
    files[2].rename(files[2].with_suffix(".x"))
    files[3].rename(files[2])
    files[2].with_suffix(".x").rename(files[3])


def rename_all(files: Files) -> None:
    for number, path in files.items():
        path.rename(path.with_name(f"other{number}.gguf"))
    (files[1].with_name("other1.gguf")).rename(files[1].with_name("m-00001-of-00004.gguf"))


def double_a_tensor(files: Files) -> None:
    plan = plan_of_file(read_gguf(files[2]))
    name = read_gguf(files[1]).tensors[0].name
    write(replace(plan, tensors=(replace(plan.tensors[0], name=name),)), files[2].with_suffix(".x"), workers=1)
    files[2].with_suffix(".x").replace(files[2])


def u16(number: int) -> Value:
    return Value(GGUFValueType.UINT16, number)


DAMAGES: dict[str, tuple[Callable[[Files], object], str]] = {
    "missing": (lambda f: f[2].unlink(), r"m-00002-of-00003\.gguf: part 2 of 3 of the model is missing"),
    "swapped": (swap, r"m-00002.*is not part 2 of the model \(expected split.no 1, found 2\)"),
    "doubled": (lambda f: shutil.copy(f[2], f[3]), r"m-00003.*is not part 3 of the model .*found 1"),
    "extra": (lambda f: shutil.copy(f[3], f[3].with_name("m-00004-of-00003.gguf")), "m-00004.*is none of the parts"),
    "renamed": (rename_all, r"is not named so \(expected m-00001-of-00003.gguf, found m-00001-of-00004.gguf\)"),
    "cut short": (lambda f: os.truncate(f[3], f[3].stat().st_size - 1), "m-00003.*file is cut short"),
    "no part": (lambda f: rewrite(f[3], dict.fromkeys(SPLIT_KEYS)), "m-00003.*is not part 3 of the model"),
    "foreign count": (lambda f: rewrite(f[2], {COUNT: u16(4)}), "m-00002.*another model.*split.count 3, found 4"),
    "foreign total": (lambda f: rewrite(f[2], {TENSORS: int32(9)}), "m-00002.*another model.*split.tensors.count"),
    "foreign architecture": (
        lambda f: rewrite(f[3], {"general.architecture": string("qwen3")}),
        "m-00003.*another model.*general.architecture llama, found qwen3",
    ),
    "tensor doubled": (double_a_tensor, "m-00002.*tensor 'token_embd.weight': is also in m-00001"),
    "wrong total": (
        lambda f: [rewrite(path, {TENSORS: int32(99)}) for path in f.values()],
        "do not hold the tensors that they should .*found 99",
    ),
    "no number": (lambda f: rewrite(f[1], {NUMBER: None}), "m-00001.*has no split.no"),
    "wrong type": (
        lambda f: rewrite(f[1], {COUNT: uint32(3)}),
        "split.count has the wrong type .*UINT16, found UINT32",
    ),
    "wrong type inside": (lambda f: rewrite(f[2], {NUMBER: uint32(1)}), "m-00002.*split.no has the wrong type"),
}


@pytest.fixture
def three(tmp_path: Path) -> Files:
    """A small model in three files, by number."""
    write(
        models.build(tmp_path, T.F16, layers=1, hidden=32, ffn=32, heads=1, heads_kv=1), tmp_path / "m.gguf", workers=1
    )
    return dict(enumerate(cut(tmp_path / "m.gguf", 4), 1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_belong_together(damage: str, three: Files) -> None:
    read_model(three[1])
    make, message = DAMAGES[damage]
    make(three)
    first = three[1] if three[1].exists() else three[1].with_name("m-00001-of-00004.gguf")
    with pytest.raises(GGUFError, match=message) as caught:
        read_model(first)
    assert "\n" not in str(caught.value)


def test_another_part_than_the_first(three: Files) -> None:
    with pytest.raises(GGUFError, match=r"is part 2 of 3.*Give the first part, as a rule m-00001-of-00003\.gguf"):
        read_model(three[2])
    assert len(read_gguf(three[2]).tensors) == 4


def test_a_split_into_one_is_no_split(tmp_path: Path) -> None:
    """llama-gguf-split makes such files, and leaves a count of 0 when it merges."""
    plan = models.build(tmp_path, T.F16, layers=1)
    for count in (0, 1):
        keys = {NUMBER: u16(0), TENSORS: int32(len(plan.tensors)), COUNT: u16(count)}
        write(replace(plan, metadata={**plan.metadata, **keys}), tmp_path / "m.gguf", workers=1, overwrite=True)
        assert read_model(tmp_path / "m.gguf") == read_gguf(tmp_path / "m.gguf")


def plans_for(folder: Path, last: np.ndarray | None = None) -> list[tuple[Path, Plan]]:
    """Files of three tensors each; the numbers of the last tensor are given."""
    plan = models.build(folder, T.F32, layers=1)
    if last is not None:
        *others, tensor = plan.tensors
        plan = replace(plan, tensors=(*others, replace(tensor, source=ArraySource(last))))
    return named(divide(plan, Limits(tensors=4)), folder / "m.gguf")


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    files = plans_for(tmp_path, np.full((300, 256), np.nan, np.float32))
    assert len(files) == 3
    with pytest.raises(DataError, match=r"output\.weight.*NaN"):
        write_all(files, workers=1)
    assert list(tmp_path.glob("m*")) == []


def test_the_first_file_appears_last_and_never_beside_files_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plans_for(tmp_path)
    renamed: list[Path] = []
    real = os.replace

    def watched(source: Path, target: Path) -> None:
        if len(renamed) == failing:
            raise OSError(5, "input/output error")
        renamed.append(Path(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    failing = 99
    write_all(files, workers=1)
    paths = [path for path, _ in files]
    assert renamed == paths[::-1]
    for failing in (1, 2):
        renamed.clear()
        with pytest.raises(OSError, match="input/output error"):
            write_all(files, workers=1, overwrite=True)
        assert renamed == paths[: -failing - 1 : -1]
        assert not paths[0].exists()
        failing = 99
        write_all(files, workers=1, overwrite=True)
        assert read_model(paths[0]).splits
    with pytest.raises(OutputError, match=r"m-0000\d-of-00003\.gguf: file exists"):
        write_all(files, workers=1)


def test_a_file_that_another_is_made_from_is_not_replaced(three: Files, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in three.values()}
    plan = plan_of_file(read_model(three[1]))
    with pytest.raises(OutputError, match="same file"):
        write_all(named(divide(plan, Limits(tensors=4)), tmp_path / "m.gguf"), overwrite=True)
    one, other = (plan_of_file(read_gguf(three[number])) for number in (1, 2))
    with pytest.raises(OutputError, match=r"m-00001.*same file"):
        write_all([(tmp_path / "new.gguf", one), (three[1], other)], overwrite=True)
    assert {path: path.read_bytes() for path in three.values()} == before
