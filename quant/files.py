"""Files that appear whole or not at all.

The bytes go to `NAME.part` beside the target: preallocated, so that a full disk is found at second 0 and not at the
end; synced; checked; renamed. While a run lives it holds a lock on the part file; what a stopped run leaves behind is
taken over by the next one, which goes on from there if a journal says how far it came. Every system call that some
laptop lacks has a fallback here; without file locks (Windows) nothing is taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gguforge.quant.errors import DataError, InputError, OutputError
from gguforge.quant.journal import Journal, Record

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


WRITTEN_AT_ONCE = 1 << 23  # bytes: waking a thread disturbs the encoders, which share the interpreter

REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that can only be about the output, never about an input."""


@dataclasses.dataclass
class Part:
    """A file that is being written.

    Attributes:
        path: where its bytes go until it is whole.
        journal: what is known to be done.
        records: what a stopped run of the same work left done; it is for the user of the block to check.
        stale: whether a stopped run left another work here, which is lost now.
        done: how much is done, in words, once that is worth keeping when the run is stopped.
    """

    path: Path
    journal: Journal
    records: list[Record]
    stale: bool = False
    done: str = ""

    def begin(self, records: Sequence[Record], fingerprint: str) -> None:
        """Go on from these records, which have proved true."""
        self.records = list(records)
        self.journal.begin(fingerprint, records)

    def record(self, position: int, digest: str, done: str) -> None:
        """Sync the data, then write down that the bytes up to `position` are final; `done` tells the user so."""
        descriptor = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.journal.append(Record(position, digest))
        if not self.done:
            sync_directory(self.path.parent)
        self.done = done


@contextlib.contextmanager
def replacing(target: Path, size: int, overwrite: bool = False) -> Iterator[Path]:
    """A part file of `size` zero bytes to fill; it takes the target's name when the block ends well, and goes when not.

    Raises:
        OutputError: the target exists (and `overwrite` is off) or is no place for a file, the disk is too small,
            another run is writing the same target, or somebody else's file has the part file's name.
        OSError: what the operating system refuses later on.
    """
    with resumable(target, size, "", overwrite) as part:
        yield part.path


@contextlib.contextmanager
def resumable(target: Path, size: int, fingerprint: str, overwrite: bool = False) -> Iterator[Part]:
    """As `replacing`; but what is recorded in the journal is kept when the run is stopped, for the next one.

    Args:
        target, size, overwrite: see `replacing`.
        fingerprint: names the work; what another work left is not used. Empty for work that is not resumed.

    Raises:
        OutputError, OSError: see `replacing`.
    """
    target = Path(os.path.realpath(target))
    check_target(target, overwrite)
    part = Part(part_of(target), Journal(part_of(target)), [])
    ours = part.journal.exists()
    descriptor = _claim(part.path)
    with contextlib.ExitStack() as claim:
        claim.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size and not ours and not part.journal.exists():
            raise OutputError(
                "this file is in the way: it is no part file of ours",
                path=part.path,
                remedy="Move it away, or write to another name.",
            )
        try:
            _prepare(part, descriptor, size, fingerprint)
            yield part
            _finish(part, descriptor, size)
            check_target(target, overwrite)  # again: it may have come into being meanwhile
            if fcntl is None:
                claim.close()  # Windows renames no open file; elsewhere the lock is held until the name is gone
            os.replace(part.path, target)
            part.journal.path.unlink(missing_ok=True)
        except BaseException as error:
            if fcntl is None:
                claim.close()
            _keep_or_remove(part, error)
            if isinstance(error, OSError) and error.filename is None and error.errno in REFUSED_WRITES:
                error.filename = os.fspath(target)
            raise
    sync_directory(target.parent)


def _prepare(part: Part, descriptor: int, size: int, fingerprint: str) -> None:
    """Take over what a stopped run of the same work left, or make `size` zero bytes."""
    if os.fstat(descriptor).st_size == size:
        part.records = part.journal.records(fingerprint)
        part.done = "the work of an earlier run" if part.records else ""
    if not part.records:
        part.stale = part.journal.is_of_another(fingerprint)
        os.truncate(descriptor, 0)  # before the journal says so: never may it speak of another work's data
        part.journal.begin(fingerprint)
        preallocate(descriptor, part.path, size)


def _finish(part: Part, descriptor: int, size: int) -> None:
    found = os.fstat(descriptor).st_size
    if found != size:
        raise OutputError(
            "file changed its size while it was written", path=part.path, expected=f"{size} bytes", found=f"{found}"
        )
    os.fsync(descriptor)


def _keep_or_remove(part: Part, error: BaseException) -> None:
    """What is recorded is kept, unless the error says that going on is of no use."""
    if part.done and fcntl is not None and not isinstance(error, InputError | DataError | OutputError):
        if not getattr(error, "__notes__", None):  # of several files, one line is enough
            error.add_note(f"{part.path} keeps {part.done}: the same command goes on from there.")
        return
    with contextlib.suppress(OSError):
        part.path.unlink()
        part.journal.path.unlink()


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
            lock(descriptor)
            if _is_named(descriptor, part):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run that held it has just renamed or removed it


def lock(descriptor: int) -> None:
    """Take a file's lock or raise BlockingIOError; where there are no locks, one run at a time is trusted in."""
    if fcntl is None:
        return
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


def read_at(descriptor: int, offset: int, into: memoryview) -> int:
    """Fill memory from `offset` on; the number of bytes read, fewer only where the file ends."""
    found = 0
    while found < len(into):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [into[found:]], offset + found)
        else:  # Windows
            os.lseek(descriptor, offset + found, os.SEEK_SET)
            data = os.read(descriptor, len(into) - found)
            count = len(data)
            into[found : found + count] = data
        if not count:
            break
        found += count
    return found


class Writeback:
    """Lets the disk begin with ranges that were just written, so that the sync at the end finds little left to do.

    Asking Linux to forget dirty pages starts their writing; they stay in memory until they are written. Elsewhere the
    system decides for itself. Starting takes as long as handing the pages to the disk, so a thread does it; it begins
    with the first range, in the process that writes.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ranges: queue.SimpleQueue[list[tuple[int, int]] | None] = queue.SimpleQueue()
        self._waiting: list[tuple[int, int]] = []
        self._thread: threading.Thread | None = None

    def start(self, offset: int, nbytes: int) -> None:
        """Begin with a range soon; returns at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        if self._waiting and sum(self._waiting[-1]) == offset:
            offset, before = self._waiting.pop()
            nbytes += before
        self._waiting.append((offset, nbytes))
        if sum(count for _, count in self._waiting) < WRITTEN_AT_ONCE:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._advise, daemon=True)
            self._thread.start()
        self._ranges.put(self._waiting)
        self._waiting = []

    def close(self) -> None:
        """End the thread: the descriptor is not used any more."""
        if self._thread is not None:
            self._ranges.put(None)
            self._thread.join()

    def _advise(self) -> None:
        while (found := self._ranges.get()) is not None:
            for offset, nbytes in found:
                with contextlib.suppress(OSError, MemoryError):  # advice only
                    os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def sync_directory(folder: Path) -> None:
    """Make a rename durable where directories can be synced; where not (Windows), the rename itself is done."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
