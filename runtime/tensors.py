"""ggml's tensors as they stand in memory, for callbacks that look into a running graph.

The struct's layout belongs to the installed llama.cpp, so its size is compared with what the library says before it is
believed. Layout: llama.cpp, ggml/include/ggml.h (struct ggml_tensor).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import EngineError
from gguforge.runtime.library import library

F32 = 0  # ggml_type
OBJECT_BYTES = 32  # GGML_OBJECT_SIZE, which ggml_tensor_overhead counts too
_LIBRARY_NAMES = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}


class Tensor(ctypes.Structure):
    """One tensor of a graph; `ne` are sizes and `nb` strides in bytes, row length first."""

    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    ]  # fmt: skip


OP_OFFSET = Tensor.op.offset


@cache
def ggml() -> Any:
    """The library that holds ggml's basic functions.

    Raises:
        EngineError: it is not where llama-cpp-python puts it, or lays tensors out in another way.
    """
    module = library()
    folder = Path(module.__file__).parent / "lib"
    path = folder / _LIBRARY_NAMES.get(sys.platform, "libggml-base.so")
    if not path.exists():
        raise EngineError("ggml's library is missing", path=path, remedy="Install llama-cpp-python again.")
    found = ctypes.CDLL(str(path))
    found.ggml_tensor_overhead.restype = c_size_t
    found.ggml_op_name.restype, found.ggml_op_name.argtypes = ctypes.c_char_p, [c_int]
    found.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    found.ggml_backend_buffer_is_host.argtypes = [c_void_p]
    found.ggml_backend_tensor_get.restype = None
    found.ggml_backend_tensor_get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    if found.ggml_tensor_overhead() - OBJECT_BYTES != ctypes.sizeof(Tensor):
        raise EngineError(
            "the installed llama.cpp lays tensors out in a way that is not known here", path=path,
            expected=f"{ctypes.sizeof(Tensor)} bytes", found=f"{found.ggml_tensor_overhead() - OBJECT_BYTES}",
            remedy="Install the version of llama-cpp-python that gguforge asks for.",
        )  # fmt: skip
    return found


@cache
def operation(name: str) -> int:
    """The number of a ggml operation, `MUL_MAT` for one; the names end where an unknown one is asked for."""
    for number in count():
        if ggml().ggml_op_name(number) == name.encode():
            return number
    raise AssertionError


def view(tensor: Tensor, address: int, dtype: type[np.generic]) -> NDArray[Any]:
    """A tensor's elements, shape (ne3, ne2, ne1, ne0), strides as they are; valid until the graph goes on.

    Args:
        address: of the tensor itself.
        dtype: of its elements; they are not blocks.
    """
    sizes, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    nbytes = dtype().itemsize + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if ggml().ggml_backend_buffer_is_host(tensor.buffer):
        memory: Any = (c_char * nbytes).from_address(tensor.data)
    else:
        memory = np.empty(nbytes, np.uint8)
        ggml().ggml_backend_tensor_get(address, memory.ctypes.data, 0, nbytes)
    return np.ndarray(sizes, dtype, memory, strides=strides)
