"""llama.cpp's own quantizer, through the installed library: what the llama-quantize tool calls."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest

from gguforge.quant.presets import PRESETS
from gguforge.quant.quantize import COPY, Guide
from gguforge.runtime.library import library

exact = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="elsewhere compilers fuse multiply and add in ggml: it differs",
)


def llama_quantize(
    source: Path,
    target: Path,
    preset: str,
    *,
    guide: Guide | None = None,
    prune: Sequence[int] = (),
    keep_split: bool = False,
) -> bool:
    """The peer's result, in `target`; where the split is kept, in files that begin with its name. Whether it made one.

    Unlike the tool, the library adds no metadata about the importance matrix.
    """
    llama_cpp = library()  # with its log hidden
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    if preset == COPY.name:
        parameters.ftype, parameters.only_copy = COPY.file_type, True
    else:
        parameters.ftype = PRESETS[preset].file_type
    parameters.keep_split = keep_split
    if prune:
        parameters.prune_layers = (ctypes.c_int32 * (len(prune) + 1))(*prune, -1)
    if guide is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(guide.weights) + 1))()
        for entry, (name, values) in zip(entries, guide.weights.items(), strict=False):
            data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), data, values.size
        parameters.imatrix = entries
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)) == 0
