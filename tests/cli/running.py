"""Runs the installed command, and watches its processes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from gguforge.cli.main import main

SCRIPT = shutil.which("gguforge", path=os.path.dirname(sys.executable))
COMMAND = [SCRIPT] if SCRIPT else [sys.executable, "-m", "gguforge.cli"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command's exit code and output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "timeout": 60} | options
    return subprocess.run([*COMMAND, *map(str, words)], check=False, **options)


def run_here(*words: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which costs a tenth: for many words that are refused in one place."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return subprocess.CompletedProcess(words, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def start(*words: object) -> subprocess.Popen[str]:
    """The command as a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def refused(done: subprocess.CompletedProcess[str], message: str, code: int = 1) -> None:
    """It ended with one line of error (or with a usage message) and printed nothing else."""
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert code == 2 or len(done.stderr.splitlines()) == 1


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Until the condition holds; fails after 30 seconds, or if the process ends before."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def has_data(part: Path) -> bool:
    """Whether a worker has written something: the file is preallocated, and zero before that."""
    try:
        with part.open("rb") as file:
            return any(iter(lambda: file.read(1 << 20).strip(b"\0"), b""))
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Peak resident bytes of a process and those it starts, summed, watched until it ends."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            peaks[pid] = max(peaks.get(pid, 0), *kilobytes, 0)
        time.sleep(0.002)
    return sum(peaks.values()) << 10
