"""Names and numbers of the GGUF format, from the `gguf` package.

Only its file of constants is loaded: importing the package also imports its reader, writer, vocabularies and their
dependencies, which takes longer (0.17 s) than most commands run. Type checkers see the ordinary import. Block types
that llama.cpp writes and released versions of the package do not know yet are added (ggml/include/ggml.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf.constants import (
        GGML_QUANT_SIZES,
        GGML_QUANT_VERSION,
        GGMLQuantizationType,
        GGUFValueType,
        Keys,
        LlamaFileType,
        TokenType,
    )
else:
    import importlib.util
    import sys
    from enum import IntEnum
    from pathlib import Path

    _NEWER = {"MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18)}

    def _load():
        package = importlib.util.find_spec("gguf")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        path = Path(package.submodule_search_locations[0]) / "constants.py"
        spec = importlib.util.spec_from_file_location(f"{__name__}._gguf", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that its enums can be pickled
        spec.loader.exec_module(module)
        return module

    _constants = _load()
    _numbers = {kind.name: kind.value for kind in _constants.GGMLQuantizationType}
    _numbers.update((name, number) for name, (number, _, _) in _NEWER.items())
    GGMLQuantizationType = IntEnum("GGMLQuantizationType", _numbers, module=__name__)
    GGML_QUANT_SIZES = {GGMLQuantizationType(kind): sizes for kind, sizes in _constants.GGML_QUANT_SIZES.items()}
    GGML_QUANT_SIZES.update((GGMLQuantizationType(n), (size, nbytes)) for n, size, nbytes in _NEWER.values())
    GGML_QUANT_SIZES[GGMLQuantizationType.Q8_1] = (32, 36)  # two halves and 32 bytes; the package says 40
    GGML_QUANT_VERSION = _constants.GGML_QUANT_VERSION
    GGUFValueType = _constants.GGUFValueType
    Keys = _constants.Keys
    LlamaFileType = _constants.LlamaFileType
    TokenType = _constants.TokenType

__all__ = [
    "GGML_QUANT_SIZES",
    "GGML_QUANT_VERSION",
    "GGMLQuantizationType",
    "GGUFValueType",
    "Keys",
    "LlamaFileType",
    "TokenType",
]
