"""Names and numbers of the GGUF format, from the `gguf` package.

Only its file of constants is loaded: importing the package also imports its reader, writer, vocabularies and their
dependencies, which takes longer (0.17 s) than most commands run. Type checkers see the ordinary import.
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
    from pathlib import Path

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
    GGML_QUANT_SIZES = _constants.GGML_QUANT_SIZES
    GGML_QUANT_VERSION = _constants.GGML_QUANT_VERSION
    GGMLQuantizationType = _constants.GGMLQuantizationType
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
