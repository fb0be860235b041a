"""Run as a child process: what libggml of the installed llama-cpp-python says about files, a line each: yes or no.

Reads the metadata alone, since libggml ends the process when it cannot allocate what a bad file declares.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
from ggml import library


class Parameters(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def accepts(path: Path) -> bool:
    """Whether gguf_init_from_file does."""
    ggml = library()
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    found = ggml.gguf_init_from_file(os.fsencode(path), Parameters(True, None))
    if found:
        ggml.gguf_free(found)
    return bool(found)


if __name__ == "__main__":
    for line in sys.stdin:
        print("yes" if accepts(Path(line.rstrip("\n"))) else "no", flush=True)
