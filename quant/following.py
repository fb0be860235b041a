"""Follows the workers through a part file: hashes what is final, and records in the journal how far that goes.

Slabs are finished nearly in file order, so the bytes before the first unfinished one are a prefix that grows. A thread
reads that prefix back (it is still in memory), hashes each tensor, and every few seconds has the data synced and writes
a record. A run that goes on from a journal first reads the prefix again: a page that was torn has another hash.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from gguforge.quant import VERSION
from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import Part
from gguforge.quant.plan import Plan
from gguforge.quant.sources import map_window

RECORD_SECONDS = 2.0  # a killed run loses no more work than that, and the time of one sync
BATCH = 1 << 23  # bytes that are hashed at once: waking a thread disturbs the encoders, which share the interpreter

Say = Callable[[str], None]


class Hashes:
    """SHA-256 of a file's tensors, taken from the first to the last.

    Attributes:
        position: bytes of the file that are read.
        tensors: digests of the tensors that lie wholly before `position`, in file order; the last one may wait for
            the next to begin.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        starts = [len(plan.header) + offset for offset in plan.offsets]
        self.bounds = [(start, start + tensor.nbytes) for start, tensor in zip(starts, plan.tensors, strict=True)]
        self.path, self.header = path, hashlib.sha256(plan.header).digest()
        self.position = len(plan.header)
        self.tensors: list[bytes] = []
        self._running = hashlib.sha256()

    def advance(self, end: int) -> None:
        """Hash on until byte `end` of the file.

        Raises:
            OutputError: the file ends before.
        """
        while self.position < end and len(self.tensors) < len(self.bounds):
            start, stop = self.bounds[len(self.tensors)]
            self.position = max(self.position, start)
            if self.position >= stop:  # hashed, or without a byte
                self._close()
                continue
            count = min(BATCH, stop - self.position, end - self.position)
            try:
                self._running.update(map_window(str(self.path), self.position, count).data)
            except InputError:
                raise OutputError("file became shorter while it was written", path=self.path) from None
            self.position += count

    def finish(self) -> None:
        """Hash to the end."""
        self.advance(self.bounds[-1][1] if self.bounds else 0)
        while len(self.tensors) < len(self.bounds):
            self._close()

    def _close(self) -> None:
        self.tensors.append(self._running.digest())
        self._running = hashlib.sha256()

    def digest(self) -> str:
        """SHA-256 over the digests of the header, of the finished tensors, and of what has come of the next one."""
        found = hashlib.sha256(self.header + b"".join(self.tensors))
        if len(self.tensors) < len(self.bounds):
            found.update(self._running.digest())
        return found.hexdigest()

    def state(self) -> tuple[int, int, hashlib._Hash]:
        """Where it stands, for `back_to`."""
        return self.position, len(self.tensors), self._running.copy()

    def back_to(self, state: tuple[int, int, hashlib._Hash]) -> None:
        """Stand there again."""
        self.position, count, self._running = state
        del self.tensors[count:]

    def in_words(self) -> str:
        """How much is done: '12 of 38 tensors'."""
        done = sum(stop <= self.position for _, stop in self.bounds)
        return f"{done} of {len(self.bounds)} tensors"


class Follower:
    """Hashes and records a part file while it is filled; as a context manager, its thread runs inside the block.

    Args:
        plan: what the file will be.
        part: the part file.
        idle: hash and record nothing.

    Attributes:
        hashes: of the bytes that are final.
    """

    def __init__(self, plan: Plan, part: Part, idle: bool = False) -> None:
        self.part, self.hashes, self.idle = part, Hashes(plan, part.path), idle
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._ends: Sequence[int] = ()
        self._waiting: set[int] = set()
        self._first = 0  # the first piece that is not finished
        self._told = 0, 0.0  # up to which byte the thread knows that all is finished, and since when

    def resume(self, fingerprint: str, say: Say, progress: Callable[[int], None]) -> None:
        """Check what a stopped run left, so that `hashes.position` says where to go on."""
        if self.part.stale:
            say(f"{self.part.path} is left from another plan, or its inputs have changed: starting anew")
        if not self.part.records:
            return
        true, last = [], self.hashes.bounds[-1][1]
        state = self.hashes.state()
        for record in self.part.records:
            if state[0] < record.position <= last:
                self.hashes.advance(record.position)
            if (self.hashes.position, self.hashes.digest()) != (record.position, record.digest):
                say(f"{self.part.path} is damaged: what follows byte {state[0]:,} is made again")
                break
            progress(record.position - state[0])
            true.append(record)
            state = self.hashes.state()
        self.hashes.back_to(state)
        self.part.begin(true, fingerprint)
        self.part.done = self.hashes.in_words() if true else ""
        if true:
            say(f"resuming: {self.part.done} are done")

    def expect(self, ends: Sequence[int]) -> None:
        """The file is going to be filled in pieces that end at these bytes, in rising order."""
        self._ends = ends

    def finished(self, number: int) -> None:
        """Piece `number` is written.

        Raises:
            BaseException: what went wrong in the thread.
        """
        if self._error is not None:
            raise self._error
        if self.idle:
            return
        self._waiting.add(number)
        while self._first in self._waiting:
            self._waiting.remove(self._first)
            self._first += 1
        known, since = self._told
        if self._final > known + BATCH or time.monotonic() > since + RECORD_SECONDS / 2:
            self._tell()

    @property
    def _final(self) -> int:
        """The bytes up to here are final."""
        return self._ends[self._first - 1] if self._first else 0

    def _tell(self) -> None:
        self._told = self._final, time.monotonic()
        self._queue.put(self._final)

    def __enter__(self) -> Follower:
        if not self.idle:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.idle:
            return
        self._stopping = kind is not None
        self._tell()
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _follow(self) -> None:
        """The thread's life."""
        try:
            recorded = time.monotonic()
            while (end := self._queue.get()) is not None:
                if not self._stopping or self.part.done:  # short runs are not worth keeping
                    self.hashes.advance(end)
                if not self._stopping and time.monotonic() - recorded > RECORD_SECONDS:
                    self.record()
                    recorded = time.monotonic()
            if not self._stopping:
                self.hashes.finish()
            elif self.part.done:
                self.record()
        except BaseException as error:  # noqa: BLE001 (it is raised in the main thread)
            self._error = error

    def record(self) -> None:
        """Sync, and write into the journal how far the file has come."""
        if not self.idle:
            self.part.record(self.hashes.position, self.hashes.digest(), self.hashes.in_words())


def tool_version() -> str:
    """The version of gguforge."""
    return VERSION


def fingerprint(plan: Plan) -> str:
    """Names the work: the same for the same version, plan and inputs, whose status tells whether they changed."""
    digest = hashlib.sha256(tool_version().encode() + plan.header)
    for tensor in plan.tensors:
        digest.update(f"{_identity(tensor.source)} {_identity(tensor.importance)}\n".encode())
    for path in sorted({path for tensor in plan.tensors for path in tensor.source.paths}):
        status = os.stat(path)
        digest.update(f"{path!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _identity(value: object) -> str:
    """Text that is the same for equal sources, arrays by their content."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_identity, value))}]"
    if is_dataclass(value):
        parts = (f"{field.name}={_identity(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({', '.join(parts)})"
    return repr(value)
