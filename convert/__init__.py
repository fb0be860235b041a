"""Convert: from a Hugging Face checkpoint to a plan of GGUF tensors, and to the file.

    convert(checkpoint, output, type="Q4_K_M")    one pass from the folder to the file
    plan(checkpoint, type="Q4_K_M")               the same, planned only

Reads config.json, *.safetensors and the tokenizer; neither torch nor transformers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguforge.convert.conversion import convert as convert
    from gguforge.convert.conversion import default_file_name as default_file_name
    from gguforge.convert.conversion import plan as plan

__all__ = ["convert", "default_file_name", "plan"]


def __getattr__(name: str) -> Any:
    """Load the stage when it is first used, so that importing it costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("gguforge.convert.conversion"), name)
