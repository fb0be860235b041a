"""Ctrl-C and SIGTERM while C code runs: a flag is set and the engine told, instead of an exception out of nowhere.

Outside the main thread, where Python allows no handlers, it does nothing. Windows has no SIGTERM to speak of.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

TERMINATED = 128 + int(signal.SIGTERM)
"""The exit code of a process that SIGTERM ended."""


class Flags:
    """Which signals came.

    Attributes:
        interrupted: Ctrl-C.
        terminated: SIGTERM.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.terminated = False

    @property
    def came(self) -> bool:
        """Whether any did."""
        return self.interrupted or self.terminated

    def raise_if_came(self) -> None:
        """Raise what the signal would have raised had it not been deferred."""
        if self.terminated:
            raise SystemExit(TERMINATED)
        if self.interrupted:
            raise KeyboardInterrupt


@contextlib.contextmanager
def deferred_signals(stop: Callable[[], None] = lambda: None) -> Iterator[Flags]:
    """Within the block, Ctrl-C and SIGTERM call `stop` and are noted; handlers are as before afterwards."""
    flags = Flags()

    def handle(number: int, _: FrameType | None) -> None:
        flags.terminated |= number == signal.SIGTERM
        flags.interrupted |= number != signal.SIGTERM
        stop()

    if threading.current_thread() is not threading.main_thread():
        yield flags
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flags
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit(143), so that `with` statements and `finally` clauses run."""

    def handle(_: int, __: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
