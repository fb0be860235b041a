"""The real ggml of the installed llama-cpp-python, through ctypes: the oracle of the block types."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from gguforge.quant.constants import GGMLQuantizationType

DECODERS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


@cache
def library() -> ctypes.CDLL:
    """libggml-base; importing llama_cpp loads what it leans on."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    found = [
        path for pattern in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll") for path in folder.glob(pattern)
    ]
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return ggml


def encode(rows: np.ndarray, type: GGMLQuantizationType, nbytes: int, weights: np.ndarray | None = None) -> np.ndarray:
    """`ggml_quantize_chunk` of rows of float32, shape (n, row length); `weights` is its importance matrix."""
    rows = np.ascontiguousarray(rows, np.float32)
    weights = None if weights is None else np.ascontiguousarray(weights, np.float32)
    out = np.zeros(nbytes, np.uint8)
    written = library().ggml_quantize_chunk(
        int(type), rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1],
        None if weights is None else weights.ctypes.data,
    )  # fmt: skip
    assert written == nbytes
    return out.reshape(rows.shape[0], -1)


def decode(data: np.ndarray, type: GGMLQuantizationType, elements: int) -> np.ndarray:
    """ggml's own dequantizer on encoded bytes."""
    name = DECODERS.get(type.name, f"dequantize_row_{type.name.lower().replace('_k', '_K')}")
    function = getattr(library(), name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    data = np.ascontiguousarray(data)
    out = np.empty(elements, np.float32)
    function(data.ctypes.data, out.ctypes.data, elements)
    return out
