"""A block type is its layout: the C struct as a NumPy dtype, with `encode` and `decode` side by side.

The base class owns shapes, tiling and the registry; a type sees only whole blocks, a tile of them at a time. It does
not search for scales: that is `gguforge.quant.search`. Structs: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Blocks = NDArray[np.void]

f2, u1, i1, u4 = "<f2", "u1", "i1", "<u4"  # the field types of the C structs

REGISTRY: dict[GGMLQuantizationType, type[Block]] = {}


class Block:
    """One ggml block type. A subclass names its type, its size in elements, and the fields of its C struct in order.

    Example: `class Q8_0(Block, type=GGMLQuantizationType.Q8_0, size=32, d=f2, qs=(i1, 32))`.

    Attributes:
        type: the ggml type.
        size: elements in a block.
        layout: one block as a structured dtype.
        tile: blocks handled at once: many enough to hide the cost of a NumPy call, few enough for the caches.
    """

    type: ClassVar[GGMLQuantizationType]
    size: ClassVar[int]
    layout: ClassVar[np.dtype[np.void]]
    tile: ClassVar[int] = 512

    def __init_subclass__(
        cls,
        *,
        type: GGMLQuantizationType | None = None,
        size: int = 0,
        tile: int = 512,
        abstract: bool = False,
        **fields: str | tuple[str, int],
    ) -> None:
        if abstract:
            return
        assert type is not None
        assert type not in REGISTRY, f"{type.name} is declared twice"
        cls.type, cls.size, cls.tile = type, size, tile
        cls.layout = np.dtype(
            [(name, *(field if isinstance(field, tuple) else (field,))) for name, field in fields.items()]
        )
        assert (size, cls.layout.itemsize) == GGML_QUANT_SIZES[type], (
            f"{type.name}: layout is no {GGML_QUANT_SIZES[type]}"
        )
        REGISTRY[type] = cls

    @staticmethod
    def encode_blocks(x: Floats, out: Blocks) -> None:
        """Fill `out` (n blocks) from `x`, shape (n, size), C-contiguous, finite."""
        raise NotImplementedError

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        """Elements of `b` (n blocks), shape (n, size), anything that casts to float32 without loss."""
        raise NotImplementedError

    @classmethod
    def encode(cls, rows: Floats) -> Bytes:
        """Quantize rows of float32.

        Args:
            rows: shape (..., row length), row length a multiple of `size`; finite. Values that overflow the type's
                scales give blocks that `is_finite` refuses.

        Returns:
            shape (..., bytes per row).
        """
        assert rows.shape[-1] % cls.size == 0
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, cls.size)
        out = np.empty(len(blocks), cls.layout)
        with np.errstate(all="ignore"):  # the C code divides by zero and overflows freely; results are checked instead
            for start in range(0, len(blocks), cls.tile):
                cls.encode_blocks(blocks[start : start + cls.tile], out[start : start + cls.tile])
        return out.view(np.uint8).reshape(*rows.shape[:-1], -1)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        """The float32 values that llama.cpp computes with; the inverse shape of `encode`."""
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1).view(cls.layout)
        out = np.empty((len(blocks), cls.size), np.float32)
        with np.errstate(all="ignore"):  # damaged scales give infinities, as in C
            for start in range(0, len(blocks), cls.tile):
                out[start : start + cls.tile] = cls.decode_blocks(blocks[start : start + cls.tile])
        return out.reshape(*data.shape[:-1], -1)

    @classmethod
    def is_finite(cls, data: Bytes) -> bool:
        """Whether all scales (for unquantized types: all values) of encoded rows are finite."""
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1).view(cls.layout)
        fields = [name for name in cls.layout.names or () if cls.layout[name].kind == "f"]
        return all(bool(np.isfinite(blocks[name]).all()) for name in fields)
