"""Fast system calls that are missing or refuse: the file is the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import posix, refuses

from gguforge.quant import files
from gguforge.quant.errors import InputError
from gguforge.quant.files import copy_range, write_at
from gguforge.quant.plan import Plan
from gguforge.quant.writer import write

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


@posix
def test_a_filesystem_without_locks(plan: Plan, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", refuses(errno.ENOLCK))
    write(plan, tmp_path / "out.gguf", workers=1)
    assert (tmp_path / "out.gguf").read_bytes() == whole


def test_write_at_leaves_the_rest_alone(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w+b") as file:
        file.write(b"0123456789")
        file.flush()
        write_at(file.fileno(), 3, memoryview(np.frombuffer(b"abcd", "<u2")))
    assert (tmp_path / "f").read_bytes() == b"012abcd789"
