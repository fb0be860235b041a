"""Workers: several processes that share out numbered pieces of work through one counter.

Each worker opens its own files, so nothing but the counter is shared. Processes and not threads, because NumPy holds
the interpreter lock between its calls.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from gguforge.quant.errors import GGUForgeError

if TYPE_CHECKING:  # imported where there is more than one worker: it takes long
    from multiprocessing.connection import Connection

LOCK_PATIENCE = 1.0  # seconds; taking a number from the counter takes microseconds
HELD_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Worker(Protocol):
    """What does the work in one process."""

    def do(self, number: int) -> Any:
        """Do one piece; what it returns can be pickled."""

    def close(self) -> None:
        """Close its files."""


Make = Callable[[], Worker]
"""Makes a worker, in the process that it works in; can be pickled."""

Done = Callable[[int, Any], None]
"""Receives the number of a piece that is done, and what `Worker.do` returned."""


def processors() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Team:
    """This process and `workers - 1` others, working through pieces `0:count`, which they begin in that order."""

    def __init__(self, make: Make, count: int, workers: int) -> None:
        self.count, self.worker = count, make()
        self.processes: list[Any] = []
        self.connections: list[Connection[Any, Any]] = []
        self.counter: Any = _Counter()
        try:
            if workers > 1:
                self._start_all(make, workers - 1)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _start_all(self, make: Make, count: int) -> None:
        from multiprocessing import get_context

        context: Any = get_context(start_method())
        self.counter = context.Value("q", 0)
        for _ in range(count):
            self._start(context, make)

    def _start(self, context: Any, make: Make) -> None:
        receiver, sender = context.Pipe(duplex=False)
        self.connections.append(receiver)
        arguments = (make, self.count, self.counter, sender, os.getpid())
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with sender, _signals_held(), warnings.catch_warnings():
            # Python 3.12 warns of forking beside BLAS's idle threads; the workers call no BLAS.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Team:
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
        self.worker.close()

    def run(self, done: Done) -> None:
        """Work until all is done; `done` is called in this process."""

        def listen() -> None:
            self._listen(done, timeout=0)

        while (number := _next(self.counter, listen)) < self.count:
            done(number, self.worker.do(number))
            listen()
        while self.connections:
            self._listen(done, timeout=None)

    def _listen(self, done: Done, timeout: float | None) -> None:
        if not self.connections:
            return
        from multiprocessing.connection import wait

        ready = wait(self.connections, timeout)
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
                done(*message)


class _Counter:
    """Stands in for the shared counter when there is one worker."""

    value = 0

    def get_lock(self) -> threading.Lock:
        return threading.Lock()


def _next(counter: Any, while_waiting: Callable[[], None]) -> int:
    """The number of the next piece.

    A process that is killed takes the counter's lock with it, so those who wait for the lock look around at times:
    `while_waiting` raises when there is nothing left to wait for.
    """
    lock = counter.get_lock()
    while not lock.acquire(timeout=LOCK_PATIENCE):
        while_waiting()
    try:
        number: int = counter.value
        counter.value = number + 1
    finally:
        lock.release()
    return number


def _serve(make: Make, count: int, counter: Any, sender: Connection[Any, Any], parent: int) -> None:
    """A worker's life: do pieces, report each, end with None or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the first process ends the others
    for number in HELD_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    def leave_if_orphaned() -> None:
        if _is_orphaned(parent):  # the first process was killed: nobody wants the rest
            raise SystemExit

    with suppress(BrokenPipeError):
        try:
            worker = make()
            while (piece := _next(counter, leave_if_orphaned)) < count:
                sender.send((piece, worker.do(piece)))
                leave_if_orphaned()
            sender.send(None)
        except (GGUForgeError, OSError, MemoryError) as error:
            sender.send(error)


def _is_orphaned(parent: int) -> bool:
    """Whether the process that started this one has died."""
    if os.name == "posix":
        return os.getppid() != parent
    from multiprocessing import parent_process

    first = parent_process()
    return first is not None and not first.is_alive()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep back what ends a process, here and in one started in the block: it is not ready for that yet."""
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
