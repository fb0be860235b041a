"""`gguforge quantize --target-size` as a process: within the bytes, what was measured is said, options that clash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import refused, run, run_here
from small_model import write_model_and_text

from gguforge.quant.quantize import plan_of_file, retype
from gguforge.quant.reader import read_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("sizing"))


def arguments(folder: Path) -> list[object]:
    return [
        "quantize",
        folder / "model.gguf",
        "--measure-on",
        folder / "text.txt",
        "--measure-chunks",
        1,
        "--threads",
        1,
    ]


def test_a_file_of_the_size(folder: Path, tmp_path: Path) -> None:
    size = retype(plan_of_file(read_gguf(folder / "model.gguf")), "Q5_0").size
    done = run(*arguments(folder), "--target-size", size, "-o", tmp_path / "m.gguf", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "chosen types: KLD 0." in done.stderr
    assert "best preset that fits: " in done.stderr
    assert (tmp_path / "m.gguf").stat().st_size <= size
    (measured,) = json.loads((tmp_path / "m.gguf.json").read_text())["measured"]
    assert f"KLD {measured['kld']:.5f}" in done.stderr
    assert (measured["text"], measured["skip"], measured["chunks"]) == ("text.txt", 1, 1)
    told = read_gguf(tmp_path / "m.gguf").metadata
    assert told["gguforge.kld.mean"].value == pytest.approx(measured["kld"])
    assert run("verify", tmp_path / "m.gguf", "--source", folder / "model.gguf").returncode == 0
    renamed, other = tmp_path / "renamed.txt", tmp_path / "text.txt"
    renamed.write_bytes((folder / "text.txt").read_bytes())
    other.write_text("another text, and long enough. " * 50)
    for text, warning in ((renamed, "this very text served to"), (other, "a text of the same name served to")):
        done = run("evaluate", tmp_path / "m.gguf", "-f", text, "-c", 64, "--chunks", 1)
        assert f"warning: {warning}" in done.stderr
        text.unlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf", "m.gguf.json", "m.gguf.sensitivity.json"]
    refused(run(*arguments(folder), "--target-size", size, "-o", tmp_path / "m.gguf"), "file exists")


def test_a_forecast_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = run(*arguments(folder), "--fit", "1GB", "--ctx", 512, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert 0.5e9 < facts["budget"] < 1e9
    assert facts["evaluations"] == 1, "everything fits"
    assert facts["seconds"] > 0
    assert list(facts["fit"]) == ["weights", "KV cache", "compute", "process"]
    assert sum(facts["fit"].values()) == 10**9
    assert sorted(folder.iterdir()) == before
    bits = json.loads(run(*arguments(folder), "--target-bpw", 6, "--dry-run", "--json").stdout)
    weights = sum(tensor.elements for tensor in read_gguf(folder / "model.gguf").tensors)
    assert bits["budget"] == pytest.approx(weights * 6 / 8, rel=0.3), "and the header"
    assert bits["evaluations"] > 10


def test_where_everything_fits_no_sweep_is_made(folder: Path, tmp_path: Path) -> None:
    done = run(*arguments(folder), "--fit", "1GB", "--ctx", 512, "-o", tmp_path / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert "the largest types of all tensors fit" in done.stderr
    assert "memory: weights " in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf", "m.gguf.json"], "no sensitivities"
    assert {t.type.name for t in read_gguf(tmp_path / "m.gguf").tensors if len(t.shape) > 1} == {"Q8_0"}


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        ([], "one of --type, --target-size, --target-bpw and --fit", 2),
        (["--target-bpw", 4, "--type", "Q4_0"], "one of --type", 2),
        (["--target-bpw", 4, "--pure"], "no other option may choose types", 2),
        (["--target-size", "much"], "'much' is no size", 1),
        (["--target-size", "1K"], "the model does not fit", 1),
        (["--target-size", "1K", "--dry-run"], "the model does not fit", 1),
        (["--fit", "1M"], "the context alone takes more memory", 1),
    ],
)
def test_refusals(words: list[object], line: str, code: int, folder: Path, tmp_path: Path) -> None:
    done = run_here(*arguments(folder), *words, "-o", tmp_path / "m.gguf")
    assert done.returncode == code, done.stderr
    assert line in done.stderr
    assert not (tmp_path / "m.gguf").exists()
    assert "Traceback" not in done.stderr


def test_a_text_is_needed(folder: Path) -> None:
    done = run("quantize", folder / "model.gguf", "--target-bpw", 4)
    assert done.returncode == 2
    assert "--measure-on TEXT" in done.stderr
