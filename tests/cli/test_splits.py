"""Split models, pruned layers and plain copies as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from checkpoints import LLAMA, Case, build
from running import refused, run

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.reader import read_gguf
from gguforge.quant.splits import read_model
from gguforge.quant.writer import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-F16.gguf"
    write(models.build(path.parent, T.F16, layers=2), path, workers=1)
    return path


@pytest.fixture(scope="module")
def parts(model: Path) -> list[Path]:
    """The same model in three files."""
    output = model.with_name("parts.gguf")
    done = run("quantize", model, "-t", "copy", "--split-max-tensors", 8, "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{model.with_name('parts-00001-of-00003.gguf')} and 2 more: ")
    return sorted(model.parent.glob("parts-*.gguf"))


def test_a_split_is_kept_under_a_name_of_its_own(parts: list[Path], tmp_path: Path) -> None:
    done = run("quantize", parts[0], "-t", "Q8_0", "--keep-split", "--json", "--threads", 1)
    made = [Path(file["path"]) for file in json.loads(done.stdout)["files"]]
    assert [path.name for path in made] == [f"parts-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    names = [[tensor.name for tensor in read_gguf(path).tensors] for path in parts]
    assert [[tensor.name for tensor in read_gguf(path).tensors] for path in made] == names
    refused(run("quantize", parts[0], "-t", "Q8_0", "--keep-split"), "file exists. Pass --overwrite to replace it.")
    for path in made:
        path.unlink()


def test_copy_merges(model: Path, parts: list[Path], tmp_path: Path) -> None:
    for source, name in ((parts[0], "merged"), (model, "copied")):
        assert run("quantize", source, "-t", "COPY", "-o", tmp_path / f"{name}.gguf").returncode == 0
    assert (tmp_path / "merged.gguf").read_bytes() == (tmp_path / "copied.gguf").read_bytes()


def test_dry_run_shows_each_file(model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-t", "Q4_K_M", "-o", tmp_path / "m.gguf", "--split-max-size", "200K")
    text = run(*words, "--dry-run").stdout
    planned = json.loads(run(*words, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert run(*words).returncode == 0
    made = sorted(tmp_path.glob("*.gguf"))
    assert len(made) > 2
    assert [(file["path"], file["bytes"]) for file in planned["files"]] == [(str(p), p.stat().st_size) for p in made]
    for path in made:
        line = f"output  {path}  {path.stat().st_size:,} bytes, {len(read_gguf(path).tensors)} tensors\n"
        assert line in text
    assert planned["bytes"] == planned["disk_bytes"] == sum(path.stat().st_size for path in made)
    assert planned["tensors"] == len(read_model(made[0]).tensors)


def test_convert_splits(tmp_path: Path) -> None:
    folder = build(Case(LLAMA), tmp_path)
    words = ("convert", folder, "--split-max-size", "100K", "--json", "--workers", 1, "-o")
    done = run(*words, tmp_path / "m.gguf")
    made = [Path(file["path"]) for file in json.loads(done.stdout)["files"]]
    assert len(made) > 1
    assert made == sorted(tmp_path.glob("m-*.gguf"))
    assert run("convert", folder, "--workers", 1, "-o", tmp_path / "whole.gguf").returncode == 0
    one, several = read_gguf(tmp_path / "whole.gguf"), read_model(made[0])
    assert [(t.name, t.type) for t in several.tensors] == [(t.name, t.type) for t in one.tensors]
    assert list(several.metadata.items())[:-3] == list(one.metadata.items())


def test_inspect_shows_the_model_or_one_file(parts: list[Path]) -> None:
    text = run("inspect", parts[0]).stdout
    facts = json.loads(run("inspect", parts[0], "--json").stdout)
    for path in parts:
        assert f"{path.name}: {path.stat().st_size:,} bytes, {len(read_gguf(path).tensors)} tensors\n" in text
    assert facts["bytes"] == sum(file["bytes"] for file in facts["files"])
    assert {tensor["file"] for tensor in facts["tensors"]} == {path.name for path in parts}
    refused(
        run("inspect", parts[1]), f"is part 2 of 3 of a split model. Give the first part, as a rule {parts[0].name}."
    )
    alone = json.loads(run("inspect", parts[1], "--alone", "--json").stdout)
    assert len(alone["tensors"]) == 8


def test_a_missing_part_is_one_line_everywhere(parts: list[Path], tmp_path: Path) -> None:
    first = tmp_path / parts[0].name
    first.write_bytes(parts[0].read_bytes())
    (tmp_path / "text.txt").write_text("some text")
    output = tmp_path / "out.gguf"
    for words in (
        ("quantize", first, "-t", "COPY", "-o", output),
        ("inspect", first),
        ("chat", first, "-p", "hello"),
        ("calibrate", first, "-f", tmp_path / "text.txt", "-o", output),
        ("evaluate", first, "-f", tmp_path / "text.txt"),
    ):
        refused(run(*words), "parts-00002-of-00003.gguf: part 2 of 3 of the model is missing")
    assert not output.exists()


def test_pruning(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    assert run("quantize", model, "-t", "Q8_0", "--prune-layers", "0", "-o", output).returncode == 0
    file = read_gguf(output)
    assert file.metadata["llama.block_count"].value == 1
    assert {tensor.name.split(".")[1] for tensor in file.tensors if tensor.name.startswith("blk")} == {"0"}
    words = ("quantize", model, "-t", "Q8_0", "-o", tmp_path / "n.gguf", "--prune-layers")
    refused(run(*words, "2"), "the model has no layer 2 to prune (expected 0 to 1)")
    refused(run(*words, "0,1"), "no layer would be left")
    refused(run(*words, "all"), "'all' is no layer")


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["COPY", "--keep-split", "--split-max-size", "1G"], "cannot be used together", 2),
        (["COPY", "--split-max-tensors", "0"], "--split-max-tensors", 2),
        (["COPY", "--split-max-size", "much"], "'much' is no size", 1),
        (["IQ2_XXS"], "tensor 'blk.0.attn_k.weight': IQ2_XXS needs an importance matrix", 1),
    ],
)
def test_refusals(words: list[str], message: str, code: int, model: Path, tmp_path: Path) -> None:
    refused(run("quantize", model, "-o", tmp_path / "m.gguf", "-t", *words), message, code)
    assert list(tmp_path.iterdir()) == []
