"""`gguforge chat` as a process: what goes where, exit codes, pipes, signals, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import run_here
from tiny_model import write_tiny_model

SAID = "Gguf files hold a model.\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tiny.gguf", extra={"general.sampling.top_k": 7, "general.sampling.mirostat": 2})
    write_tiny_model(folder / "endless.gguf", endless=True, context=131072)
    write_tiny_model(folder / "plain.gguf", template=None)
    write_tiny_model(folder / "unknown.gguf", architecture="fancynet")
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gguforge.cli", "chat", *map(str, arguments)]


def chat(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        command(*arguments, "--threads", 1),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_answer(models: Path) -> None:
    code, out, err = chat(models / "tiny.gguf", "-p", "hello")
    assert (code, out) == (0, SAID)
    assert err.splitlines() == [
        "tiny.gguf · llama 98.2K F32 · 0.4 MB · context 512 · 1 thread",
        "note: the file asks for general.sampling.mirostat, which is not supported here.",
    ]


def test_prompt_and_piped_text_are_joined(models: Path) -> None:
    def prompt_tokens(*arguments: str, stdin: str | None) -> int:
        code, out, _ = chat(models / "tiny.gguf", "--json", *arguments, stdin=stdin)
        assert code == 0
        return int(json.loads(out)["prompt_tokens"])

    alone = prompt_tokens("-p", "zz", stdin=None)
    joined = prompt_tokens("-p", "zz", stdin="yyy\n")
    assert joined == prompt_tokens("-p", "zz\n\nyyy", stdin=None) > alone
    assert prompt_tokens(stdin="zz") == prompt_tokens("-p", "zz", stdin="") == alone


def test_json(models: Path) -> None:
    code, out, _ = chat(models / "tiny.gguf", "-p", "hello", "--json", "--seed", 5, "--max-tokens", 3, "--context", 300)
    told = json.loads(out)
    assert code == 0
    assert (told["answer"], told["stop"], told["generated_tokens"]) == ("Gguf files hold", "length", 3)
    assert (told["sampling"]["seed"], told["sampling"]["top_k"], told["sampling"]["min_p"]) == (5, 7, 0.05)
    assert told["context"] >= 300
    assert told["first_token_seconds"] > 0
    assert told["tokens_per_second"] > 0


def test_sampling_flags(models: Path) -> None:
    flags = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "repeat_penalty": 1.5, "seed": 9}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    told = json.loads(chat(models / "tiny.gguf", "-p", "hello", "--json", *words)[1])
    assert {name: told["sampling"][name] for name in flags} == flags


def test_a_model_without_a_template_continues(models: Path) -> None:
    code, out, err = chat(models / "plain.gguf", "-p", "x\n", "--max-tokens", 2)
    assert (code, out) == (0, " Gguf files\n")
    assert "no chat template: it continues your text" in err


def test_the_library_is_silent_unless_asked(models: Path) -> None:
    assert "llama_model_loader" not in chat(models / "tiny.gguf", "-p", "hello")[2]
    assert "llama_model_loader" in chat(models / "tiny.gguf", "-p", "hello", "--verbose")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["missing.gguf", "-p", "x"], 1, "missing.gguf: no such file"),
        ([".", "-p", "x"], 1, "not a file"),
        (["cut.gguf", "-p", "x"], 1, "cut short"),
        (["noise.gguf", "-p", "x"], 1, "not a GGUF file"),
        (["unknown.gguf", "-p", "x"], 1, "does not know the architecture 'fancynet'"),
        (["tiny.gguf", "-p", "x", "--context", "2000000000"], 1, "not enough memory"),
        (["tiny.gguf", "-p", "x " * 600], 1, "does not fit the context"),
        (["tiny.gguf"], 2, "There is no prompt"),
        (["tiny.gguf", "-p", "x", "--top-p", "2"], 2, "--top-p"),
        (["tiny.gguf", "-p", "x", "--nonsense"], 2, "--nonsense"),
        ([], 2, "MODEL"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    models: Path, arguments: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / "cut.gguf").write_bytes((models / "tiny.gguf").read_bytes()[:300_000])
    (models / "noise.gguf").write_bytes(b"noise" * 100)
    monkeypatch.chdir(models)
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        done = run_here("chat", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")


def test_json_needs_a_prompt_and_no_stdin_is_an_empty_one(models: Path) -> None:
    assert chat(models / "tiny.gguf", "--json", stdin="")[0] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Unix signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_answer_and_tell(models: Path, number: signal.Signals, code: int) -> None:
    words = command(models / "endless.gguf", "-p", "hello", "--context", 131072, "--threads", 1)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(4) == b"Gguf"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out.endswith(b"\n")
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Unix pipes")
def test_a_closed_pipe_is_quiet(models: Path) -> None:
    words = command(models / "endless.gguf", "-p", "hello", "--context", 131072, "--threads", 1)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4) == b"Gguf"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) != 0
    assert err.decode().count("\n") == 1, err
    process.stderr.close()


def test_an_encoding_that_lacks_the_characters_is_no_failure(models: Path) -> None:
    path = write_tiny_model(models / "accent.gguf", answer=["▁caf", "<0xC3>", "<0xA9>", "!"])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        command(path, "-p", "hello"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"caf?!\n")


def test_help_needs_no_llama_cpp() -> None:
    code = "import sys, gguforge.cli.chat; sys.exit('llama_cpp' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
