"""Files appear whole or not at all: every system call fails once, at every place; every fast one is taken away."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.quant import files, following
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import copy_range, replacing, write_at
from gguforge.quant.metadata import string
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import ArraySource, FileSource
from gguforge.quant.writer import write

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX calls")
CALLS = (
    "open", "truncate", "posix_fallocate", "copy_file_range", "lseek", "read", "write", "fstat", "fsync", "replace",
    "posix_fadvise", "preadv",
)  # fmt: skip
OLD = b"the old file"


def small_plan(folder: Path) -> Plan:
    """A copied tensor, an encoded one, one from memory."""
    path = folder / "input.bin"
    path.write_bytes((np.arange(128, dtype=np.float32) / 64).tobytes())
    return Plan(
        {"general.name": string("small")},
        (
            TensorPlan("copied", (64,), T.F32, FileSource(str(path), 0, (64,), T.F32)),
            TensorPlan("encoded", (2, 32), T.Q8_0, FileSource(str(path), 256, (2, 32), T.F32)),
            TensorPlan("made", (3,), T.F32, ArraySource(np.ones(3, np.float32))),
        ),
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return small_plan(tmp_path)


@pytest.fixture
def whole(plan: Plan, tmp_path: Path) -> bytes:
    """What the plan's file must be."""
    write(plan, tmp_path / "whole.gguf", workers=1)
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "whole.gguf").unlink()
    return data


class Faults:
    """Makes the Nth system call fail, and, if `persistent`, all that follow."""

    def __init__(self, at: int, error: Callable[[], BaseException], persistent: bool = False) -> None:
        self.at, self.error, self.persistent = at, error, persistent
        self.count, self.failed = 0, ""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            if hasattr(os, name):
                patch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "posix_fadvise" and isinstance(self.error(), KeyboardInterrupt):
                return real(*arguments, **keywords)  # a thread calls it, and Ctrl-C never reaches one
            self.count += 1
            if self.count == self.at or (self.persistent and self.count > self.at):
                self.failed = self.failed or name
                raise self.error()
            return real(*arguments, **keywords)

        return call


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
import test_files
from gguforge.quant import following
from gguforge.quant.writer import write

following.RECORD_SECONDS = {seconds}
folder = Path({folder!r})
plan, target, part = test_files.small_plan(folder), folder / "model.gguf", folder / "model.gguf.part"
write(plan, target, workers=1)
whole, parts = target.read_bytes(), 0
for at in range(1, 1000):
    target.write_bytes(test_files.OLD)
    if not os.fork():
        with test_files.pytest.MonkeyPatch.context() as patch:
            test_files.Faults(at, lambda: os.kill(os.getpid(), signal.SIGKILL)).install(patch)
            write(plan, target, workers=1, overwrite=True)
        os._exit(0)
    status = os.wait()[1]
    found = target.read_bytes()
    assert found in (test_files.OLD, whole), at
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


def refuses(number: int) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


real_write = os.write
FALLBACKS: dict[str, dict[str, Any]] = {
    "no copy_file_range": {"copy_file_range": None},
    "copy across filesystems": {"copy_file_range": refuses(errno.EXDEV)},
    "copy of an odd file": {"copy_file_range": refuses(errno.EINVAL)},
    "copy not in the kernel": {"copy_file_range": refuses(errno.ENOSYS)},
    "copy that copies nothing": {"copy_file_range": lambda *_: 0},
    "no posix_fallocate": {"posix_fallocate": None},
    "a filesystem without it": {"posix_fallocate": refuses(errno.EOPNOTSUPP)},
    "no preadv": {"preadv": None},
    "no posix_fadvise": {"posix_fadvise": None},
    "advice refused": {"posix_fadvise": refuses(errno.EINVAL)},
    "writes of few bytes": {"write": lambda descriptor, data: real_write(descriptor, data[:7])},
    "all at once": {"copy_file_range": None, "posix_fallocate": None, "O_NOFOLLOW": None, "O_CLOEXEC": None},
}


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_without_a_fast_call_the_file_is_the_same(
    fallback: str, plan: Plan, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, replacement in FALLBACKS[fallback].items():
        if replacement is None:
            monkeypatch.delattr(os, name, raising=False)
        else:
            monkeypatch.setattr(os, name, replacement, raising=False)
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


def test_short_kernel_copies_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(source: int, target: int, nbytes: int, source_offset: int, target_offset: int) -> int:
        data = os.pread(source, min(nbytes, 5), source_offset)
        return os.pwrite(target, data, target_offset)

    if not hasattr(os, "pread"):
        pytest.skip("no pread here")
    monkeypatch.setattr(os, "copy_file_range", some, raising=False)
    (tmp_path / "source").write_bytes(bytes(range(100)))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("w+b") as target:
        copy_range(source.fileno(), 10, target.fileno(), 3, 42)
    assert (tmp_path / "target").read_bytes() == bytes(3) + bytes(range(10, 52))


@pytest.mark.parametrize("kernel", [True, False])
def test_an_input_that_ends_early(kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    (tmp_path / "source").write_bytes(b"short")
    with (
        (tmp_path / "source").open("rb") as source,
        (tmp_path / "target").open("w+b") as target,
        pytest.raises(InputError, match="shorter"),
    ):
        copy_range(source.fileno(), 0, target.fileno(), 0, 6)


def test_directories_that_cannot_be_synced(
    plan: Plan, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_folders(path: Any, flags: int, mode: int = 0o777) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", no_folders)
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no fcntl, as on Windows"])
def test_two_runs_at_once(locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:
        monkeypatch.setattr(files, "fcntl", None)
    target = tmp_path / "m.gguf"
    with replacing(target, 4) as part:
        part.write_bytes(b"good")
        with (
            pytest.raises(OutputError, match=r"^\S+m\.gguf\.part: another run is writing this file"),
            replacing(target, 4),
        ):
            pytest.fail("the second run got in")
    assert target.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_a_run_that_opens_the_part_while_another_finishes_makes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock comes free in the very moment in which the part file gets its final name."""
    target = tmp_path / "m.gguf"
    real = files.lock

    def finish_then_lock(descriptor: int) -> None:
        monkeypatch.setattr(files, "lock", real)
        os.replace(tmp_path / "m.gguf.part", target)  # what the other run does with it
        real(descriptor)

    (tmp_path / "m.gguf.part").write_bytes(b"whole")
    monkeypatch.setattr(files, "lock", finish_then_lock)
    with contextlib.suppress(ZeroDivisionError), replacing(target, 4, overwrite=True):
        assert target.read_bytes() == b"whole"
        raise ZeroDivisionError
    assert target.read_bytes() == b"whole"


@posix
def test_a_filesystem_without_locks(plan: Plan, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", refuses(errno.ENOLCK))
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


@pytest.mark.parametrize("journal", [b"", b"\0" * 512, b"gguforge journal 1 ", b"gguforge journal 1 0123\n5 torn"])
def test_a_stale_part_is_taken_over(journal: bytes, plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.part").write_bytes(b"x" * 100_000)
    (tmp_path / "out.gguf.part.journal").write_bytes(journal)
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.bin", "out.gguf"]


def test_an_empty_part_is_taken_over(plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.gguf.part").touch()
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


@pytest.mark.parametrize(("name", "what"), [("part", "no part file of ours"), ("part.journal", "no journal of ours")])
def test_files_of_others_are_not_touched(name: str, what: str, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / f"out.gguf.{name}").write_bytes(b"precious")
    with pytest.raises(OutputError, match=what):
        write(plan, tmp_path / "out.gguf", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.bin", f"out.gguf.{name}"]
    assert (tmp_path / f"out.gguf.{name}").read_bytes() == b"precious"


@posix
def test_a_part_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "m.gguf.part").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic link"), replacing(tmp_path / "m.gguf", 4):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious"


@posix
def test_a_link_as_target_stays_a_link(plan: Plan, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.gguf").symlink_to("elsewhere/real.gguf")
    write(plan, tmp_path / "link.gguf", workers=1)
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "elsewhere" / "real.gguf").read_bytes() == whole
    with pytest.raises(OutputError, match="exists"):
        write(plan, tmp_path / "link.gguf", workers=1)


def test_targets_that_cannot_be(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "exists").touch()
    cases = [("folder", "this is a folder"), ("no/where", "no such folder"), ("exists", "Pass --overwrite")]
    for name, message in cases:
        with pytest.raises(OutputError, match=message):
            write(plan, tmp_path / name, workers=1)
    if os.name == "posix":
        with pytest.raises(OutputError, match="device or pipe"):
            write(plan, "/dev/full", workers=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exists", "folder", "input.bin"]


@pytest.mark.parametrize("name", ["same", "symlink", "hard link", "part"])
def test_the_output_is_never_an_input(name: str, plan: Plan, tmp_path: Path) -> None:
    source, output = tmp_path / "input.bin", tmp_path / "out.gguf"
    before = source.read_bytes()
    if name == "same":
        output = source
    elif name == "symlink":
        output.symlink_to(source)
    elif name == "hard link":
        output.hardlink_to(source)
    else:  # the part file of the output is the input: it would be emptied
        source = source.rename(tmp_path / "out.gguf.part")
        moved = FileSource(str(source), 0, (64,), T.F32)
        plan = Plan({}, (TensorPlan("a", (64,), T.F32, moved),))
    with pytest.raises(OutputError, match="same file"):
        write(plan, output, workers=1, overwrite=True)
    assert source.read_bytes() == before


def test_a_target_that_comes_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"

    def run() -> None:
        with replacing(target, 4) as part:
            part.write_bytes(b"mine")
            target.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="exists"):
        run()
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_too_small_is_found_at_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"not enough disk space \(expected [\d,]+ bytes, found 100 free\)"):
        write(plan, tmp_path / "out.gguf", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["input.bin"]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_not_renamed(change: int, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="changed its size"), replacing(tmp_path / "m.gguf", 8) as part:
        os.truncate(part, 8 + change)
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_written_too(tmp_path: Path) -> None:
    with replacing(tmp_path / "empty", 0):
        pass
    assert (tmp_path / "empty").read_bytes() == b""


def test_write_at_leaves_the_rest_alone(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        file.write(b"0123456789")
        file.flush()
        write_at(file.fileno(), 3, memoryview(np.frombuffer(b"abcd", "<u2")))
    assert (tmp_path / "f").read_bytes() == b"012abcd789"


def test_an_error_that_cannot_be_cleaned_up_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", refuses(errno.EROFS))
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "m.gguf", 4):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf.part", "m.gguf.part.journal"]
