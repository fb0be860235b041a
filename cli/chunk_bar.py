"""A progress bar that counts chunks of text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class ChunkBar:
    """Shown from the first report on, since only then the number of chunks is known; silent when not `shown`."""

    def __init__(self, label: str, shown: bool, unit: str = "chunk") -> None:
        self._label, self._shown, self._unit = label, shown, unit
        self._bar: Any = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if not self._shown:
            return
        from tqdm import tqdm

        first = self._bar is None
        if first:
            tqdm.monitor_interval = 0  # no watching thread
            scale = not self._unit  # bytes, for example
            self._bar = tqdm(
                total=total, initial=done, desc=self._label, unit=self._unit, unit_scale=scale, leave=False
            )
        self._bar.set_postfix_str(note, refresh=first)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def chunk_bar(label: str, quiet: bool) -> Iterator[ChunkBar]:
    """A bar on stderr; none when quiet or when stderr is no terminal."""
    bar = ChunkBar(label, not quiet and sys.stderr.isatty())
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def stages_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar after the other on stderr, each under its own label; none when quiet or when stderr is no terminal."""
    shown = not quiet and sys.stderr.isatty()
    bars: dict[str, ChunkBar] = {}

    def tell(label: str, done: int, total: int) -> None:
        if label not in bars:
            for bar in bars.values():
                bar.close()
            bars.clear()
            bars[label] = ChunkBar(label, shown)
        bars[label](done, total)

    try:
        yield tell
    finally:
        for bar in bars.values():
            bar.close()
