"""The `gguforge` command itself: help, exit codes, one line for each failure."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from running import run

from gguforge.cli import main as cli
from gguforge.cli.main import COMMANDS, describe_os_error, main, report
from gguforge.quant import VERSION
from gguforge.quant.errors import InputError


def test_version_names_what_matters() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"gguforge {VERSION} ")
    assert "llama-cpp-python " in done.stdout
    assert "numpy " in done.stdout


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command(option: str) -> None:
    done = run(option)
    assert (done.returncode, done.stderr) == (0, "")
    text = "".join(done.stdout.split())  # lines are folded
    for name, line in COMMANDS.items():
        assert f"{name} {line}".replace(" ", "") in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_one_and_has_examples(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: gguforge {name}" in done.stdout
    assert f"\n  gguforge {name}" in done.stdout or f"\n    gguforge {name}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from gguforge.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'llama_cpp', 'gguf', 'jinja2', 'tqdm', 'sentencepiece'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["--fly"], "No such option '--fly'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "a", "b"], "unexpected extra argument"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], message: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.replace("No such option: --fly", "No such option '--fly'")
    assert "Usage: gguforge" in done.stderr


@pytest.mark.parametrize("words", [["--debug", "inspect", "absent"], ["inspect", "absent", "--debug"]])
def test_debug_shows_the_traceback(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FileNotFoundError" in done.stderr.splitlines()[-1]


def test_behind_two_dashes_debug_is_a_name(tmp_path: Path) -> None:
    done = run("inspect", "--", "--debug", cwd=tmp_path)
    assert done.stderr == "error: --debug: no such file or directory\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("is bad", path="a\nb", remedy="Mend it."), 1, "error: a\\nb: is bad. Mend it.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (MemoryError(), 1, "error: out of memory. Close other programs or choose fewer --workers.\n"),
        (OSError(errno.EIO, "Input/output error", "x\x1b"), 1, "error: x\\x1b: input/output error\n"),
        (click.UsageError("no"), 2, "Error: no\n"),
        (SystemExit(143), 143, ""),
        (click.exceptions.Exit(3), 3, ""),
    ],
)
def test_failures_have_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == code
    assert capsys.readouterr() == ("", line)


def test_common_refusals_have_a_remedy() -> None:
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EDQUOT):
        line = describe_os_error(OSError(number, os.strerror(number), "m.gguf"))
        assert line.startswith("m.gguf: ")
        assert line.endswith(".")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.cli, "main", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


def test_sigterm_unwinds_and_the_handler_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    unwound = []

    def terminated(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli.cli, "main", terminated)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "x"])
    assert (ended.value.code, unwound) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before
