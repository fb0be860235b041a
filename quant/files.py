"""Files that appear whole or not at all.

The bytes go to `NAME.part` beside the target: preallocated, so that a full disk is found at second 0 and not at the
end; synced; checked; renamed. While a run lives it holds a lock on the part file; what a killed run leaves behind is
taken over by the next one. Every system call that some laptop lacks has a fallback here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gguforge.quant.errors import InputError, OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that can only be about the output, never about an input."""


@contextlib.contextmanager
def replacing(target: Path, size: int, overwrite: bool = False) -> Iterator[Path]:
    """A part file of `size` zero bytes to fill; it takes the target's name when the block ends well, and goes when not.

    Raises:
        OutputError: the target exists (and `overwrite` is off) or is no place for a file, the disk is too small,
            or another run is writing the same target.
        OSError: what the operating system refuses later on.
    """
    target = Path(os.path.realpath(target))
    check_target(target, overwrite)
    part = part_of(target)
    descriptor = _claim(part)
    with contextlib.ExitStack() as claim:
        claim.callback(os.close, descriptor)
        try:
            os.truncate(descriptor, 0)
            preallocate(descriptor, part, size)
            yield part
            found = os.fstat(descriptor).st_size
            if found != size:
                raise OutputError(
                    "file changed its size while it was written",
                    path=part,
                    expected=f"{size} bytes",
                    found=f"{found}",
                )
            os.fsync(descriptor)
            check_target(target, overwrite)  # again: it may have come into being meanwhile
            if fcntl is None:
                claim.close()  # Windows renames no open file; elsewhere the lock is held until the name is gone
            os.replace(part, target)
        except BaseException as error:
            if fcntl is None:
                claim.close()
            with contextlib.suppress(OSError):
                part.unlink()
            if isinstance(error, OSError) and error.filename is None and error.errno in REFUSED_WRITES:
                error.filename = os.fspath(target)
            raise
    sync_directory(target.parent)


def part_of(target: Path) -> Path:
    """The part file of a target whose links are resolved."""
    return target.with_name(target.name + ".part")


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse early what cannot become the output.

    Raises:
        OutputError: with the remedy.
    """
    if target.is_dir():
        raise OutputError("this is a folder", path=target, remedy="Give the path of a file.")
    if not target.parent.is_dir():
        raise OutputError("no such folder", path=target.parent, remedy="Make it first, or write elsewhere.")
    if target.exists() and not target.is_file():
        raise OutputError("this is a device or pipe, not a file", path=target, remedy="Give the path of a file.")
    if target.exists() and not overwrite:
        raise OutputError("file exists", path=target, remedy="Pass --overwrite to replace it.")


def _claim(part: Path) -> int:
    """Open the part file for this run alone; a symbolic link in its place is refused."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW"):
        flags |= getattr(os, name, 0)
    busy = OutputError(
        "another run is writing this file",
        path=part,
        remedy="Wait for it, or delete the part file if there is none.",
    )
    if fcntl is None:
        try:
            return os.open(part, flags | os.O_EXCL, 0o666)
        except FileExistsError:
            raise busy from None
    while True:
        descriptor = os.open(part, flags, 0o666)
        try:
            _lock(descriptor)
            if _is_named(descriptor, part):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has just renamed or removed it


def _lock(descriptor: int) -> None:
    """Take the lock or raise BlockingIOError; filesystems that know no locks are trusted to one run at a time."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EACCES:
            raise BlockingIOError from None
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def preallocate(descriptor: int, path: Path, size: int) -> None:
    """Give an empty file `size` zero bytes that the disk really has.

    Raises:
        OutputError: the disk has less.
    """
    free = shutil.disk_usage(path.parent).free
    no_space = OutputError(
        "not enough disk space", path=path.parent, expected=f"{size:,} bytes", found=f"{free:,} free",
        remedy="Free some space or write to another disk.",
    )  # fmt: skip
    if free < size:
        raise no_space
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is None or not size:
        os.truncate(descriptor, size)
        return
    try:
        reserve(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space from None
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(descriptor, size)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> None:
    """Copy bytes between two open files, inside the kernel where it can.

    Raises:
        InputError: the source ends early.
    """
    kernel_copy = getattr(os, "copy_file_range", None)
    while nbytes:
        copied = 0
        if kernel_copy is not None:
            try:
                copied = kernel_copy(source, target, nbytes, source_offset, target_offset)
            except OSError as error:
                if error.errno not in (
                    errno.EXDEV,
                    errno.EINVAL,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EBADF,
                    errno.EPERM,
                ):
                    raise
            if not copied:  # refused, or a filesystem that answers 0: read and write instead
                kernel_copy = None
                continue
        else:
            os.lseek(source, source_offset, os.SEEK_SET)
            data = os.read(source, min(nbytes, 1 << 22))
            if not data:
                raise InputError("the input became shorter while it was read")
            write_at(target, target_offset, data)
            copied = len(data)
        source_offset, target_offset, nbytes = source_offset + copied, target_offset + copied, nbytes - copied


def write_at(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `offset`, however little the system takes at once."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with a range that was just written, so that the sync at the end finds little left to do.

    Asking Linux to forget dirty pages starts their writing; they stay in memory until they are written. Elsewhere the
    system decides for itself.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        with contextlib.suppress(OSError):  # advice only
            advise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_directory(folder: Path) -> None:
    """Make a rename durable where directories can be synced; where not (Windows), the rename itself is done."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
