"""What running a model takes besides its weights, told by llama.cpp itself: it builds the graphs and allocates nothing.

Exact for every architecture and cache type, since llama.cpp computes it; the figures are read from its log, the only
place where it tells them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gguforge.quant.errors import EngineError
from gguforge.quant.splits import read_model
from gguforge.runtime.checks import check_runnable
from gguforge.runtime.library import LOG, c_path, library

PROCESS = 64 << 20  # bytes of the process itself and its allocator
_CACHE = re.compile(r"^llama_(?:kv_cache\w*|memory_recurrent)\w*:\s+size =\s*([0-9.]+) MiB")
_COMPUTE = re.compile(r"(?:compute|output) buffer size\s*=\s*([0-9.]+) MiB")
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
"""Types of the KV cache by their numbers in ggml."""


@dataclass(frozen=True)
class Buffers:
    """Bytes that a context takes.

    Attributes:
        cache: keys and values, and recurrent states.
        compute: of the largest graph, and the output.
    """

    cache: int
    compute: int

    @property
    def total(self) -> int:
        """All that is needed besides the weights, the process included."""
        return self.cache + self.compute + PROCESS


def buffers(path: str | os.PathLike[str], context: int, cache_type: str = "f16", batch: int = 512) -> Buffers:
    """Ask llama.cpp what a context of so many tokens takes.

    Args:
        path: a GGUF file; the types of its weights make no difference here.
        context: tokens.
        cache_type: of keys and values, one of `CACHE_TYPES`.
        batch: tokens of a batch.

    Raises:
        GGUFError: the file is damaged.
        EngineError: llama.cpp cannot run it.
    """
    file = read_model(path)
    check_runnable(file)
    llama = library()
    LOG.complaints.clear()
    params = llama.llama_model_default_params()
    params.no_alloc, params.n_gpu_layers = True, 0
    params.load_mode = 0  # no mapping, no reading
    with LOG.recorded() as lines:
        model = llama.llama_model_load_from_file(c_path(file.path), params)
        if not model:
            raise EngineError(f"llama.cpp cannot load it: {LOG.reason() or 'no reason given'}", path=file.path)
        try:
            _make_context(model, file.path, context, cache_type, batch)
        finally:
            llama.llama_model_free(model)
    return Buffers(_sum(_CACHE, lines), _sum(_COMPUTE, lines))


def _sum(pattern: re.Pattern[str], lines: list[str]) -> int:
    """Bytes in all lines that match."""
    return sum(round(float(match[1]) * 2**20) for line in lines if (match := pattern.search(line)))


def _make_context(model: object, path: Path, context: int, cache_type: str, batch: int) -> None:
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = context, min(batch, context), min(batch, context)
    params.type_k = params.type_v = CACHE_TYPES[cache_type]
    made = llama.llama_init_from_model(model, params)
    if not made:
        raise EngineError(f"llama.cpp cannot make a context of {context} tokens: {LOG.reason()}", path=path)
    llama.llama_free(made)
