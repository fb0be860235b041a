"""llama.cpp behind its C functions: its log, opening a model and a context, and what it says when it refuses.

Only `llama_cpp.llama_cpp` (ctypes) is used, never the high-level class. Nothing here reads text or samples.
API: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguforge.quant.errors import EngineError
from gguforge.runtime.interrupt import deferred_signals

WARNING_LEVEL, ERROR_LEVEL = 3, 4  # ggml_log_level


class Log:
    """Keeps llama.cpp's last complaints instead of printing them; with `verbose` all lines go to stderr as well."""

    def __init__(self) -> None:
        self.verbose = False
        self.complaints: deque[str] = deque(maxlen=20)
        self._record: list[str] | None = None

    def __call__(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        if self.verbose:
            sys.stderr.write(line)
        if self._record is not None:
            self._record.append(line)
        if level in (WARNING_LEVEL, ERROR_LEVEL):
            self.complaints.append(line.strip())

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """All lines that are said in the block."""
        found: list[str] = []
        self._record = found
        try:
            yield found
        finally:
            self._record = None

    def reason(self) -> str:
        """The first line of the last failure, without the C function's name; empty when nothing was said."""
        for line in self.complaints:
            if match := re.search(r"error loading model(?: \w+)*: (.*)", line):
                return match[1]
        for line in self.complaints:
            if "failed" in line or "error" in line.lower():
                return re.sub(r"^\w+: ", "", line)
        return ""


LOG = Log()
_callbacks: list[Any] = []  # what C may call lives as long as the process


def library() -> Any:
    """The ctypes module, started on first use with its log turned to `LOG`."""
    import llama_cpp.llama_cpp as llama

    if not _callbacks:
        _callbacks.append(llama.llama_log_callback(LOG))
        llama.llama_log_set(_callbacks[0], None)
        llama.llama_backend_init()
    return llama


def load_model(path: Path, *, vocab_only: bool = False) -> Any:
    """Load a file that was found sound; the weights are mapped, not read, where the platform can.

    Raises:
        EngineError: llama.cpp does not take it.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came while loading.
    """
    llama = library()
    LOG.complaints.clear()
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    with deferred_signals() as signals:
        params.progress_callback = llama.llama_progress_callback(lambda share, data: not signals.came)
        model = llama.llama_model_load_from_file(c_path(path), params)
    if model and signals.came:
        llama.llama_model_free(model)
    signals.raise_if_came()
    if not model:
        raise _refusal(path)
    return model


def new_context(model: Any, path: Path, *, context: int, threads: int, **fields: Any) -> Any:
    """A context of `context` tokens that computes on `threads` threads.

    Args:
        fields: further ones of llama_context_params; without them a batch has 512 tokens and is one graph.

    Raises:
        EngineError: llama.cpp cannot make it, as a rule for want of memory.
    """
    llama = library()
    LOG.complaints.clear()
    params = llama.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = min(512, context)
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    for name, value in fields.items():
        assert hasattr(params, name)
        setattr(params, name, value)
    made = llama.llama_init_from_model(model, params)
    if not made:
        raise EngineError(
            f"llama.cpp cannot make a context of {context} tokens: {LOG.reason() or 'no reason given'}",
            path=path,
            remedy="A smaller context takes less memory.",
        )
    return made


def c_path(path: Path) -> bytes:
    """A path for C: llama.cpp wants UTF-8 on Windows and the file system's own bytes elsewhere."""
    return str(path).encode() if sys.platform == "win32" else os.fsencode(path)


def _refusal(path: Path) -> EngineError:
    reason = LOG.reason()
    if match := re.search(r"unknown model architecture: '(.*)'", reason):
        return EngineError(
            f"the installed llama.cpp does not know the architecture {match[1]!r}",
            path=path,
            remedy="A newer llama-cpp-python may: pip install -U llama-cpp-python",
        )
    return EngineError(f"llama.cpp cannot load it: {reason or 'no reason given'}", path=path)
