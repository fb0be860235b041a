"""A block type is its layout: the C struct as a NumPy dtype, with `encode` and `decode` side by side.

The base class owns shapes, tiling and the registry; a type sees only whole blocks, a tile of them at a time. It does
not search for scales: that is `gguforge.quant.search`. Structs: ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguforge.quant.errors import InputError
from gguforge.quant.search.base import add_up, as_groups, f32, scratch

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Blocks = NDArray[np.void]

f2, u1, i1, u4 = "<f2", "u1", "i1", "<u4"  # the field types of the C structs

WEIGHTED_TILE = 1 << 17  # elements
BUFFER = 512  # elements; with more, NumPy copies a broadcast row into its buffer, which doubles the cost of the call

Kind: TypeAlias = "type[Block]"  # within a block type, `type` is its number

REGISTRY: dict[GGMLQuantizationType, Kind] = {}

# What a type makes of the importance w of a column, for a weight x: nothing; w itself; or w * sqrt(m + x^2), where m is
# the mean of x^2 over the row or the block, or twice that of the block: the sum doubled first, which may overflow, or
# the sum times 2 / size, which does so later.
Importance = Literal["ignored", "plain", "row", "block", "twice", "scaled"]


class Block:
    """One ggml block type. A subclass names its type, its size in elements, and the fields of its C struct in order.

    Example: `class Q8_0(Block, type=GGMLQuantizationType.Q8_0, size=32, d=f2, qs=(i1, 32))`.

    Attributes:
        type: the ggml type.
        size: elements in a block.
        layout: one block as a structured dtype.
        tile: blocks handled at once: many enough to hide the cost of a NumPy call, few enough for the caches.
        weighted_tile: the same where weights have importance: then every type searches.
        importance: what it makes of an importance matrix.
        required: whether it cannot be encoded without one.
        shows_nan: whether, without importance, NaN or infinity among a block's weights makes it one that `is_finite`
            refuses.
    """

    type: ClassVar[GGMLQuantizationType]
    size: ClassVar[int]
    layout: ClassVar[np.dtype[np.void]]
    tile: ClassVar[int] = 512
    weighted_tile: ClassVar[int] = 512
    importance: ClassVar[Importance] = "ignored"
    required: ClassVar[bool] = False
    shows_nan: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        type: GGMLQuantizationType | None = None,
        size: int = 0,
        tile: int = 512,
        weighted_tile: int | None = None,
        importance: Importance = "ignored",
        required: bool = False,
        abstract: bool = False,
        **fields: str | tuple[str, int],
    ) -> None:
        if abstract:
            return
        assert type is not None
        assert type not in REGISTRY, f"{type.name} is declared twice"
        cls.type, cls.size, cls.tile, cls.importance, cls.required = type, size, tile, importance, required
        cls.weighted_tile = weighted_tile or WEIGHTED_TILE // size
        cls.layout = np.dtype(
            [(name, *(field if isinstance(field, tuple) else (field,))) for name, field in fields.items()]
        )
        assert (size, cls.layout.itemsize) == GGML_QUANT_SIZES[type], (
            f"{type.name}: layout is no {GGML_QUANT_SIZES[type]}"
        )
        REGISTRY[type] = cls

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        """Fill `out` (n blocks) from `x`, shape (n, size), C-contiguous, finite; `w` is the importance of each."""
        raise NotImplementedError

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        """Elements of `b` (n blocks), shape (n, size), anything that casts to float32 without loss."""
        raise NotImplementedError

    @staticmethod
    def to_float(values: Any, out: Floats) -> None:
        """Elements of an unquantized type in its own form, without loss, into `out`."""
        raise NotImplementedError

    @classmethod
    def encode(cls, rows: Floats, weights: Floats | None = None) -> Bytes:
        """Quantize rows of float32.

        Args:
            rows: shape (..., row length), row length a multiple of `size`; finite. Values that overflow the type's
                scales give blocks that `is_finite` refuses.
            weights: importance of each column, shape (row length,), not negative, finite.

        Returns:
            shape (..., bytes per row).

        Raises:
            InputError: this type needs weights, and there are none.
        """
        assert rows.shape[-1] % cls.size == 0
        if weights is None and cls.required:
            raise InputError(
                f"block type {cls.type.name} needs an importance matrix", remedy="Pass one, or choose another type."
            )
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, cls.size)
        out = np.empty(len(blocks), cls.layout)
        with fast_arithmetic():
            weigh = None
            if weights is not None and cls.importance != "ignored":
                weigh = Weigher(cls, rows.shape[-1], blocks, weights)
            size = cls.tile if weigh is None else cls.weighted_tile
            for start in range(0, len(blocks), size):
                tile = slice(start, start + size)
                w = None if weigh is None else weigh(tile)
                cls.encode_blocks(blocks[tile], w, out[tile])
        return out.view(np.uint8).reshape(*rows.shape[:-1], -1)

    @classmethod
    def encode_stored(cls, data: Bytes, stored: Kind, weights: Floats | None = None) -> Bytes:
        """As `encode`, from rows that are stored in another type, shape (..., bytes per row)."""
        if stored.size > 1 or cls.size == 1 or cls.required or (weights is not None and cls.importance != "ignored"):
            return cls.encode(stored.decode(data), weights)
        words = np.ascontiguousarray(data).reshape(-1).view(f"<u{stored.layout.itemsize}").reshape(-1, cls.size)
        out = np.empty(len(words), cls.layout)
        with fast_arithmetic():
            for start in range(0, len(words), cls.tile):
                cls.encode_words(words[start : start + cls.tile], stored, out[start : start + cls.tile])
        return out.view(np.uint8).reshape(*data.shape[:-1], -1)

    @classmethod
    def encode_words(cls, words: NDArray[Any], stored: Kind, out: Blocks) -> None:
        """As `encode_blocks`, from the words of an unquantized type, shape (n, size)."""
        x = scratch("decoded", words.shape)
        stored.to_float(words.view(stored.layout["value"]), x)
        cls.encode_blocks(x, None, out)

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
        halves = (np.ascontiguousarray(blocks[name]).view("<u2") for name in fields)  # NumPy asks halves one by one
        return all(int((half & np.uint16(0x7C00)).max(initial=0)) < 0x7C00 for half in halves)


@contextmanager
def fast_arithmetic() -> Iterator[None]:
    """Within the block NumPy divides by zero and overflows as freely as C, whose results are checked instead."""
    with np.errstate(all="ignore"):
        np.setbufsize(BUFFER)  # errstate restores it
        yield


class Weigher:
    """The importance of every weight of a tile of blocks, from that of the columns (see `Importance`)."""

    def __init__(self, kind: type[Block], length: int, blocks: Floats, weights: Floats) -> None:
        assert weights.shape == (length,)
        self.kind, self.blocks = kind, blocks
        self.columns = np.ascontiguousarray(weights, np.float32).reshape(-1, kind.size)
        if kind.importance == "row":
            rows = blocks.reshape(-1, length)
            self.mean = np.array([sum_in_order(row * row) for row in rows], np.float32) / f32(length)

    def __call__(self, tile: slice) -> Floats:
        """Shape (n, size), in working memory."""
        x, w = self.blocks[tile], scratch("importance", self.blocks[tile].shape)
        index = np.arange(*tile.indices(len(self.blocks)))
        columns = self.columns.take(index % len(self.columns), axis=0, out=scratch("columns", x.shape), mode="clip")
        if self.kind.importance == "plain":
            return columns
        np.square(x, out=w)
        if self.kind.importance == "row":
            mean = self.mean[index // len(self.columns)]
        else:
            mean = block_mean(w, self.kind.importance)
        np.sqrt(np.add(w, mean[:, None], out=w), out=w)
        return np.multiply(columns, w, out=w)


def sum_in_order(terms: Floats) -> np.float32:
    """First element first, as a C loop adds; shape (n,)."""
    total: np.float32 = np.add.accumulate(terms)[-1]
    return total


def block_mean(squares: Floats, importance: Importance) -> Floats:
    """Means of blocks as an `Importance` has it: shape (n, size) -> (n,), each summed in order."""
    size = squares.shape[1]
    sums = add_up(as_groups(squares, size, "squares"))  # three times as fast as running sums along the blocks
    mean: Floats = (
        sums * f32(2 / size) if importance == "scaled" else sums * f32(1 + (importance == "twice")) / f32(size)
    )
    return mean
