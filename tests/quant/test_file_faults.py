"""Files appear whole or not at all: every system call fails once, at every place."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import OLD, Faults, refuses

from gguforge.quant import following
from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import replacing
from gguforge.quant.plan import Plan
from gguforge.quant.writer import write


@pytest.mark.parametrize(
    ("kind", "persistent", "old", "seconds"),
    [
        *itertools.product(["ENOSPC", "EIO", "EDQUOT", "Ctrl-C", "memory"], [False, True], [False, True], [1000]),
        ("EIO", False, True, 0),
        ("EIO", True, False, 0),
        ("Ctrl-C", False, False, 0),
    ],
)
def test_every_call_fails_once(
    kind: str,
    persistent: bool,
    old: bool,
    seconds: float,
    plan: Plan,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "RECORD_SECONDS", seconds)
    errors: dict[str, Callable[[], BaseException]] = {"Ctrl-C": KeyboardInterrupt, "memory": MemoryError}
    number = getattr(errno, kind, 0)
    error = errors.get(kind, lambda: OSError(number, os.strerror(number)))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "model.gguf"
    failed, kept = set(), 0
    for at in range(1, 1000):
        for path in folder.iterdir():
            path.unlink()
        if old:
            target.write_bytes(OLD)
        faults, raised = Faults(at, error, persistent), False
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch)
            try:
                write(plan, target, workers=1, overwrite=True)
            except (OutputError, InputError, type(error())):
                raised = True
        if not faults.failed:
            break
        failed.add(faults.failed)
        found = target.read_bytes() if target.exists() else None
        assert found in (whole, OLD if old else None), f"call {at}, {faults.failed}: half a file"
        assert raised or found == whole, f"call {at}, {faults.failed}: the error was swallowed"
        if left := sorted(path.name for path in set(folder.iterdir()) - {target}):
            empty = (folder / left[0]).stat().st_size == 0  # the very claim of the part file may leave it so
            assert (left == ["model.gguf.part"] and empty) or (
                seconds == 0 and left == ["model.gguf.part", "model.gguf.part.journal"]
            ), f"call {at}, {faults.failed}: {left}"
            kept += not empty
            write(plan, target, workers=1, overwrite=True)
            assert target.read_bytes() == whole, f"call {at}, {faults.failed}: not taken over"
            assert sorted(path.name for path in folder.iterdir()) == ["model.gguf"]
    assert target.read_bytes() == whole
    assert failed >= {"open", "truncate", "lseek", "write", "fstat", "fsync", "replace"}
    assert bool(kept) == (seconds == 0)


KILL_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import faults
import pytest
from gguforge.quant import following
from gguforge.quant.writer import write

following.RECORD_SECONDS = {seconds}
folder = Path({folder!r})
plan, target, part = faults.small_plan(folder), folder / "model.gguf", folder / "model.gguf.part"
write(plan, target, workers=1)
whole, parts = target.read_bytes(), 0
for at in range(1, 1000):
    target.write_bytes(faults.OLD)
    if not os.fork():
        with pytest.MonkeyPatch.context() as patch:
            faults.Faults(at, lambda: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
            write(plan, target, workers=1, overwrite=True)
        os._exit(0)
    status = os.wait()[1]
    found = target.read_bytes()
    assert found in (faults.OLD, whole), at
    parts += part.exists()
    write(plan, target, workers=1, overwrite=True)  # takes over what is left
    assert target.read_bytes() == whole and not part.exists(), at
    if status == 0:
        break
print(at, parts)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and kill")
@pytest.mark.parametrize("seconds", [0, 1000], ids=["recording", "not recording"])
def test_kill_9_at_every_call(seconds: float, tmp_path: Path) -> None:
    script = KILL_AT_EVERY_CALL.format(tests=str(Path(__file__).parent), folder=str(tmp_path), seconds=seconds)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    calls, parts = map(int, child.stdout.split())
    assert calls > parts > 10


def test_an_error_that_cannot_be_cleaned_up_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", refuses(errno.EROFS))
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "m.gguf", 4):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf.part", "m.gguf.part.journal"]
