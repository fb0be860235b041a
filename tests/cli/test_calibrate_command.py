"""`gguforge calibrate` as a process: what goes where, exit codes, Ctrl-C, merging."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from running import refused, run, run_here
from small_model import write_model_and_text

from gguforge.cli.chunk_bar import ChunkBar
from gguforge.cli.main import main
from gguforge.quant.imatrix import read_imatrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_text(tmp_path_factory.mktemp("calibrate"))


def calibrate(*arguments: object) -> tuple[int, str, str]:
    done = run("calibrate", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_one_matrix(folder: Path, tmp_path: Path) -> None:
    code, out, err = calibrate(
        folder / "model.gguf", "-f", folder / "text.txt", "-o", tmp_path / "i.gguf", "-c", 64, "--chunks", 3, "-t", 1
    )
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'i.gguf'}: 14 tensors, 3 chunks of 64 tokens\n"
    assert read_imatrix(tmp_path / "i.gguf").chunk_count == 3
    code, out, err = calibrate("--merge", tmp_path / "i.gguf", "--merge", tmp_path / "i.gguf", "--json")
    facts = json.loads(out)
    assert (code, facts["chunks"], facts["chunk_size"], facts["output"]) == (0, 6, 64, None)
    twice = tmp_path / "i.gguf"
    assert err == f"warning: the same text went into {twice} and {twice}: it counts twice\n"
    assert facts["coverage"][0] == {
        "tensor": "blk.0.attn_k.weight", "experts": 1, "unused": [], "least": 384, "most": 384,
    }  # fmt: skip
    assert calibrate("--merge", tmp_path / "i.gguf", "-o", tmp_path / "i.dat", "-q") == (0, "", "")
    assert calibrate("--merge", tmp_path / "i.dat")[1].startswith("14 tensors")


def test_usage_and_input_errors(folder: Path, tmp_path: Path) -> None:
    model, text = folder / "model.gguf", folder / "text.txt"
    for arguments, code, message in (
        ((model,), 2, "MODEL and -f TEXT belong together"),
        ((), 2, "Give MODEL and -f TEXT"),
        ((model, "-f", text, "--resume", "--merge", "x"), 2, "exclude each other"),
        ((model, "-f", text, "-o", tmp_path / "i.gguf", "-c", 4096), 1, "the text is too short"),
        ((model, "-f", tmp_path / "no.txt"), 1, "no such file"),
        ((text, "-f", text, "-o", tmp_path / "i.gguf"), 1, "this is not a GGUF file"),
        (("--merge", model), 1, "is not an importance matrix"),
        ((model, "-f", text, "-o", tmp_path / "none" / "i.gguf"), 1, "no such folder"),
    ):
        refused(run_here("calibrate", *arguments), message, code)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_at_two(_: ChunkBar, done: int, total: int, note: str = "") -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ChunkBar, "__call__", stop_at_two)
    model, text, output = folder / "model.gguf", folder / "text.txt", tmp_path / "i.gguf"
    arguments = ["calibrate", model, "-f", text, "-o", output, "-c", 64, "-t", 1]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 130
    kept = tmp_path / "i.partial.gguf"
    assert capsys.readouterr().err.split("\n")[0] == f"kept what was done in {kept}; go on with --resume"
    assert [read_imatrix(kept).chunk_count, output.exists()] == [2, False]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--resume"])
    assert ended.value.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]
