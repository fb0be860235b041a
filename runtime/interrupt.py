"""Ctrl-C, SIGTERM and SIGHUP: what they end is tidied up; while C code runs, a flag is set and the engine told.

SIGHUP comes when the terminal is closed; under `nohup` it is ignored and stays so. Outside the main thread, where
Python allows no handlers, nothing is done. Windows has no SIGTERM to speak of and no SIGHUP.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that end a process from outside."""

TERMINATED = 128 + int(signal.SIGTERM)
"""The exit code of a process that SIGTERM ended."""


class Flags:
    """Which signals came.

    Attributes:
        interrupted: Ctrl-C.
        terminated: SIGTERM or SIGHUP.
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
    """Within the block, Ctrl-C, SIGTERM and SIGHUP call `stop` and are noted; handlers are as before afterwards."""
    flags = Flags()

    def handle(number: int, _: FrameType | None) -> None:
        flags.terminated |= number in ENDING
        flags.interrupted |= number not in ENDING
        stop()

    with _handled(handle, (signal.SIGINT, *ENDING)):
        yield flags


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit(143 and 129), so that `with` and `finally` do their work."""

    def handle(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled(handle, ENDING):
        yield


@contextlib.contextmanager
def _handled(handle: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Within the block, a handler for those signals that are not ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
