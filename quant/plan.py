"""The plan: every output tensor with its name, shape, type, place and source, made from headers alone.

A plan is data: it can be printed, compared and costed before any work is done, and `gguforge.quant.writer` executes
it in any order. It does not read tensor data. GGUF layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguforge.quant.metadata import Value, pack_string
from gguforge.quant.sources import Floats, Source

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32


def row_bytes(type: GGMLQuantizationType, row_length: int) -> int:
    """Bytes of one row of `row_length` elements stored as `type`.

    >>> row_bytes(GGMLQuantizationType.Q4_K, 512)
    288
    """
    block_size, block_bytes = GGML_QUANT_SIZES[type]
    assert row_length % block_size == 0, f"{row_length} elements are no whole number of {type.name} blocks"
    return row_length // block_size * block_bytes


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`.

    >>> padded(33, 32)
    64
    """
    return -(-size // alignment) * alignment


def dimensions_on_disk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as GGUF writes it: row length first, without trailing ones, which ggml does not count as dimensions.

    >>> dimensions_on_disk((1, 8, 256))
    (256, 8)
    """
    dimensions = shape[::-1]
    while len(dimensions) > 1 and dimensions[-1] == 1:
        dimensions = dimensions[:-1]
    return dimensions


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: its GGUF name.
        shape: NumPy order (the row length is last; GGUF files store the reverse).
        type: the block type it is written in.
        source: where its elements come from; `source.shape == shape`.
        reason: the rule that chose the type, in words, for `--dry-run` and `--explain`.
        fallback: the type the preset wanted, where the row length did not allow it.
        importance: importance of each column, shape (matrices, row length), where an importance matrix is used.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    source: Source
    reason: str = ""
    fallback: GGMLQuantizationType | None = None
    importance: Floats | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.source.shape == self.shape, f"{self.name}: source {self.source.shape} is not {self.shape}"

    @property
    def row_length(self) -> int:
        """Elements in one row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return math.prod(self.shape[:-1])

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the output."""
        return row_bytes(self.type, self.row_length)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output, without padding."""
        return self.rows * self.row_bytes

    @property
    def rows_per_matrix(self) -> int:
        """Rows that share one row of `importance`."""
        return self.rows // (1 if self.importance is None else len(self.importance))

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes go into the output unchanged."""
        return self.type == self.source.type


@dataclass(frozen=True)
class Plan:
    """A whole GGUF file before it is written.

    Attributes:
        metadata: keys and values in file order.
        tensors: tensors in file order.
        alignment: bytes; the data section and every tensor begin at a multiple of it.
        every_dimension: write trailing ones of a shape too, as llama.cpp's converter does and ggml does not.
    """

    metadata: Mapping[str, Value]
    tensors: tuple[TensorPlan, ...]
    alignment: int = field(default=DEFAULT_ALIGNMENT)
    every_dimension: bool = False

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Each tensor's offset in bytes from the start of the data section."""
        offsets, end = [], 0
        for tensor in self.tensors:
            offsets.append(end)
            end += padded(tensor.nbytes, self.alignment)
        return tuple(offsets)

    @cached_property
    def header(self) -> bytes:
        """Everything before the data section, padding included."""
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(self.tensors), len(self.metadata))]
        parts += [pack_string(key) + value.pack() for key, value in self.metadata.items()]
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            dimensions = tensor.shape[::-1] if self.every_dimension else dimensions_on_disk(tensor.shape)
            layout = f"<I{len(dimensions)}QIQ"
            parts.append(
                pack_string(tensor.name) + struct.pack(layout, len(dimensions), *dimensions, tensor.type, offset)
            )
        data = b"".join(parts)
        return data.ljust(padded(len(data), self.alignment), b"\0")

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section, padding included."""
        return sum(padded(tensor.nbytes, self.alignment) for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Tensor bits per weight, over the whole model; 0 for a file without weights."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / self.elements if self.elements else 0.0
