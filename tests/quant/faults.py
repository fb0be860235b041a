"""A small plan, and system calls that fail: what the tests of files stand on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.metadata import string
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.sources import ArraySource, FileSource

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


def refuses(number: int) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call
