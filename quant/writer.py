"""Executes a plan: several processes fill the tensors in at their known offsets, slab by slab.

A slab is some rows of one tensor, small enough that memory stays flat however large the model is. Slabs are handed out
by a shared counter; each worker opens its own files, so nothing but the counter is shared. The header is written last:
a file cut at any moment is no GGUF file. Processes and not threads, because NumPy holds the interpreter lock between
its calls.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gguforge.quant.blocks import block_type, encode
from gguforge.quant.blocks.base import REGISTRY
from gguforge.quant.errors import DataError, GGUForgeError, OutputError
from gguforge.quant.files import copy_range, part_of, replacing, start_writeback, write_at
from gguforge.quant.plan import Plan, TensorPlan, dimensions_on_disk
from gguforge.quant.reader import read_gguf
from gguforge.quant.sources import Bytes, Floats

ENCODE_SLAB = 1 << 18  # elements: 1 MiB of float32, and about ten times that in temporaries
COPY_SLAB = 1 << 22  # bytes
BASE_MEMORY = 60 << 20  # bytes of an idle process with NumPy loaded
SLAB_MEMORY = 24 << 20  # bytes a worker needs beyond that, for one slab of ordinary rows
LOCK_PATIENCE = 1.0  # seconds; taking a number from the counter takes microseconds
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows `start:stop` of tensor number `index`."""

    index: int
    start: int
    stop: int


def slabs(plan: Plan) -> Iterator[Slab]:
    """The work of a plan, in file order."""
    for index, tensor in enumerate(plan.tensors):
        step = max(
            1,
            COPY_SLAB // max(1, tensor.row_bytes) if tensor.is_copy else ENCODE_SLAB // max(1, tensor.row_length),
        )
        matrix = tensor.rows_per_matrix
        for first in range(0, tensor.rows if tensor.row_length else 0, max(1, matrix)):
            end = first + matrix  # a slab has one importance: it ends where a matrix ends
            for start in range(first, end, step):
                yield Slab(index, start, min(end, start + step))


def processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers(plan: Plan) -> int:
    """All processors for a plan that encodes; one for a plan that mostly copies, which the disk alone holds up."""
    encoded = sum(tensor.elements for tensor in plan.tensors if not tensor.is_copy)
    return processors() if 8 * encoded > plan.elements else 1


def peak_memory(plan: Plan, workers: int | None = None) -> int:
    """Upper estimate, in bytes, of the resident memory of all processes while the plan is executed."""
    workers = workers or default_workers(plan)
    longest = max((tensor.row_length for tensor in plan.tensors), default=0)
    return workers * (BASE_MEMORY + SLAB_MEMORY * max(1, longest // ENCODE_SLAB)) + 2 * len(plan.header)


def write(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Execute a plan.

    Args:
        plan: what to write.
        output: the file; appears only when it is complete, synced and re-read.
        workers: processes to use; by default what `default_workers` finds suitable.
        overwrite: replace an existing file.
        progress: called with the number of output bytes that were finished since the last call.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
        InputError: an input is cut short or its type is not supported.
        DataError: a tensor holds NaN or infinity, or values too large for its type.
    """
    write_all([(Path(output), plan)], workers=workers, overwrite=overwrite, progress=progress)


def write_all(
    files: Sequence[tuple[Path, Plan]],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Execute the plans of one model's files, which appear only when all are complete; the first one appears last.

    Whatever happens on the way, a first file stands only beside the files that belong to it: where an older model of
    the same name is replaced, its first file goes before any other is renamed.

    Args:
        files: each file with its plan, in order.
        workers, overwrite, progress: see `write`.

    Raises:
        GGUForgeError: see `write`.
    """
    check_inputs(files)
    with ExitStack() as renaming:  # unwinds from the last file to the first
        parts = [renaming.enter_context(replacing(path, plan.size, overwrite)) for path, plan in files]
        for part, (_, plan) in zip(parts, files, strict=True):
            _execute(plan, part, workers, progress or (lambda _: None))
        if len(files) > 1:
            Path(os.path.realpath(files[0][0])).unlink(missing_ok=True)


def _execute(plan: Plan, part: Path, workers: int | None, progress: Progress) -> None:
    """Fill a part file, sync it, and read it back."""
    work = list(slabs(plan))
    with _Team(plan, part, work, min(workers or default_workers(plan), max(1, len(work) // 4))) as team:
        team.run(progress)
    descriptor = os.open(part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        write_at(descriptor, 0, plan.header)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    verify(plan, part)


def check_inputs(files: Sequence[tuple[Path, Plan]]) -> None:
    """Refuse plans that read what they overwrite (part files included), or whose types have no encoder."""
    tensors = [tensor for _, plan in files for tensor in plan.tensors]
    for tensor in tensors:
        if not tensor.is_copy:
            with _naming(tensor):
                block_type(tensor.type), block_type(tensor.source.type)
    sources = {path for tensor in tensors for path in tensor.source.paths}
    for output, _ in files:
        target = Path(os.path.realpath(output))
        overwritten = [path for path in (target, part_of(target)) if path.exists()]
        if any(os.path.samefile(path, one) for path in sources for one in overwritten):
            raise OutputError("output and input are the same file", path=output, remedy="Choose another name with -o.")


@contextmanager
def _naming(tensor: TensorPlan) -> Iterator[None]:
    """Errors say which tensor they are about."""
    try:
        yield
    except GGUForgeError as error:
        error.tensor = error.tensor or tensor.name
        raise


def verify(plan: Plan, path: Path) -> None:
    """Read the written file back with the strict reader and compare it with the plan."""
    found = read_gguf(path)
    layouts = [
        [(tensor.name, dimensions_on_disk(tensor.shape), tensor.type) for tensor in tensors]
        for tensors in (plan.tensors, found.tensors)
    ]
    if layouts[0] != layouts[1] or list(found.metadata) != list(plan.metadata) or found.size != plan.size:
        raise OutputError(
            "the written file is not what was planned", path=path, remedy="Check the disk, and report this."
        )


class _Filler:
    """One worker's open files, and the act of filling a slab."""

    def __init__(self, plan: Plan, part: Path) -> None:
        self.plan, self.data_offset = plan, len(plan.header)
        self.target = os.open(part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        self.inputs: dict[str, int] = {}

    def close(self) -> None:
        for descriptor in (self.target, *self.inputs.values()):
            os.close(descriptor)

    def fill(self, slab: Slab) -> int:
        """Write one slab; returns its bytes."""
        tensor = self.plan.tensors[slab.index]
        offset = self.data_offset + self.plan.offsets[slab.index] + slab.start * tensor.row_bytes
        nbytes = (slab.stop - slab.start) * tensor.row_bytes
        with _naming(tensor):
            if tensor.is_copy:
                self._copy(tensor, slab, offset, nbytes)
            else:
                write_at(self.target, offset, self._encode(tensor, slab).data)
            start_writeback(self.target, offset, nbytes)
        return nbytes

    def _copy(self, tensor: TensorPlan, slab: Slab, offset: int, nbytes: int) -> None:
        rows = tensor.source.raw_rows(slab.start, slab.stop)
        if tensor.type in REGISTRY and not block_type(tensor.type).is_finite(rows):
            raise not_finite(tensor, "holds NaN or infinity")
        extent = tensor.source.extent
        if extent is None:
            write_at(self.target, offset, np.ascontiguousarray(rows).data)
            return
        if extent.path not in self.inputs:
            self.inputs[extent.path] = os.open(extent.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        copy_range(
            self.inputs[extent.path],
            extent.offset + slab.start * tensor.row_bytes,
            self.target,
            offset,
            nbytes,
        )

    def _encode(self, tensor: TensorPlan, slab: Slab) -> Bytes:
        rows: Floats = tensor.source.rows(slab.start, slab.stop)
        if rows.size and not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
            raise not_finite(tensor, "holds NaN or infinity")
        weights = None if tensor.importance is None else tensor.importance[slab.start // tensor.rows_per_matrix]
        data = encode(rows, tensor.type, weights)
        if not block_type(tensor.type).is_finite(data):
            raise not_finite(tensor, f"holds values too large for {tensor.type.name}")
        return data


def not_finite(tensor: TensorPlan, what: str) -> DataError:
    """The error for numbers that no block can hold."""
    paths = tensor.source.paths
    return DataError(
        what, path=paths[0] if paths else None, remedy="The checkpoint is damaged or diverged in training."
    )


class _Team:
    """This process and `workers - 1` others, working through one list of slabs."""

    def __init__(self, plan: Plan, part: Path, work: list[Slab], workers: int) -> None:
        self.work, self.filler = work, _Filler(plan, part)
        self.processes: list[Any] = []
        self.connections: list[Connection[Any, Any]] = []
        context: Any = multiprocessing.get_context(start_method())
        self.counter = context.Value("q", 0) if workers > 1 else _Counter()
        try:
            for _ in range(workers - 1):
                self._start(context, plan, part)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _start(self, context: Any, plan: Plan, part: Path) -> None:
        receiver, sender = context.Pipe(duplex=False)
        self.connections.append(receiver)
        arguments = (plan, part, self.counter, sender, os.getpid())
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with sender, _signals_held(), warnings.catch_warnings():
            # Python 3.12 warns of forking beside BLAS's idle threads; the workers call no BLAS.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> _Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if kind is not None:
                process.terminate()
            process.join()
        for connection in self.connections:
            connection.close()
        self.filler.close()

    def run(self, progress: Progress) -> None:
        def listen() -> None:
            self._listen(progress, timeout=0)

        while (index := _next(self.counter, listen)) < len(self.work):
            progress(self.filler.fill(self.work[index]))
            listen()
        while self.connections:
            self._listen(progress, timeout=None)

    def _listen(self, progress: Progress, timeout: float | None) -> None:
        ready = wait(self.connections, timeout) if self.connections else []
        for connection in [one for one in self.connections if one in ready]:
            try:
                message = connection.recv()
            except (EOFError, OSError):  # it ended between two messages, or within one
                remedy = "Memory may have run out: try fewer --workers."
                raise GGUForgeError("a worker process was killed", remedy=remedy) from None
            if isinstance(message, BaseException):
                raise message
            if message is None:
                self.connections.remove(connection)
                connection.close()
            else:
                progress(message)


class _Counter:
    """Stands in for the shared counter when there is one worker."""

    value = 0

    def get_lock(self) -> threading.Lock:
        return threading.Lock()


def _next(counter: Any, while_waiting: Callable[[], None]) -> int:
    """The number of the next slab.

    A process that is killed takes the counter's lock with it, so those who wait for the lock look around at times:
    `while_waiting` raises when there is nothing left to wait for.
    """
    lock = counter.get_lock()
    while not lock.acquire(timeout=LOCK_PATIENCE):
        while_waiting()
    try:
        index: int = counter.value
        counter.value = index + 1
    finally:
        lock.release()
    return index


def _serve(plan: Plan, part: Path, counter: Any, sender: Connection[Any, Any], parent: int) -> None:
    """A worker's life: fill slabs, report bytes, end with None or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    def leave_if_orphaned() -> None:
        if _is_orphaned(parent):  # the first process was killed: nobody wants the rest
            raise SystemExit

    work = list(slabs(plan))
    with suppress(BrokenPipeError):
        try:
            filler = _Filler(plan, part)
            while (index := _next(counter, leave_if_orphaned)) < len(work):
                sender.send(filler.fill(work[index]))
                leave_if_orphaned()
            sender.send(None)
        except (GGUForgeError, OSError, MemoryError) as error:
            sender.send(error)


def _is_orphaned(parent: int) -> bool:
    """Whether the process that started this one has died."""
    if os.name == "posix":
        return os.getppid() != parent
    first = multiprocessing.parent_process()
    return first is not None and not first.is_alive()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep back Ctrl-C and SIGTERM, here and in a process started in the block: it is not ready for them yet."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_method() -> str:
    """How workers are started: forked where that is safe (it takes milliseconds), else from scratch."""
    alone = threading.active_count() == 1
    return "fork" if sys.platform == "linux" and alone else "spawn"


__all__ = ["Slab", "default_workers", "peak_memory", "slabs", "verify", "write", "write_all"]
