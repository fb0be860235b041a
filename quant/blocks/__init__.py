"""Block types: one class per ggml type, found by its number; `encode` and `decode` by type."""

from __future__ import annotations

from gguforge.quant.blocks import floats, fp4, iq1, iq2, iq3, kquants, legacy, lowbit, nonlinear
from gguforge.quant.blocks.base import REGISTRY, Block, Bytes, Floats
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.errors import InputError

__all__ = [
    "REGISTRY",
    "Block",
    "block_type",
    "decode",
    "encode",
    "floats",
    "fp4",
    "iq1",
    "iq2",
    "iq3",
    "kquants",
    "legacy",
    "lowbit",
    "nonlinear",
]


def block_type(type: GGMLQuantizationType) -> type[Block]:
    """The class of a ggml type.

    Raises:
        InputError: this type cannot be encoded or decoded here.
    """
    if type not in REGISTRY:
        known = ", ".join(sorted(kind.name for kind in REGISTRY))
        raise InputError(f"block type {type.name} is not supported", remedy=f"Supported: {known}.")
    return REGISTRY[type]


def encode(rows: Floats, type: GGMLQuantizationType, weights: Floats | None = None) -> Bytes:
    """Rows of float32, shape (..., row length), as blocks: shape (..., bytes per row).

    Args:
        rows: finite float32.
        type: the block type.
        weights: importance of each column, shape (row length,); types without a use for it ignore it.

    Raises:
        InputError: the type is not supported, or needs weights.
    """
    return block_type(type).encode(rows, weights)


def decode(data: Bytes, type: GGMLQuantizationType) -> Floats:
    """Blocks, shape (..., bytes per row), as float32: shape (..., row length)."""
    return block_type(type).decode(data)
