"""A strict reader of GGUF files: either the whole layout is sound, or one GGUFError says what is not.

Every length is a Python int (they cannot wrap) and is compared with the bytes that are left before anything is
allocated, so a crafted file costs no more time or memory than an honest one of its size. Tensor data is not read.
It does not read big-endian files, version 1, or arrays of arrays (llama.cpp refuses the last two as well).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguforge.quant.errors import GGUFError
from gguforge.quant.metadata import STRUCT_CODES, Scalar, Value
from gguforge.quant.plan import DEFAULT_ALIGNMENT, MAGIC, padded
from gguforge.quant.sources import FileSource, map_window

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the terminating zero
MAX_KEY_BYTES = 65535
MAX_ALIGNMENT = 65536
MAX_ELEMENTS = 2**63 - 1  # ggml counts elements and bytes in int64
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one letter, type, one byte
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, dimensions, type, offset
MAX_ITEMS = 2**26  # of an array, 250 times the largest vocabulary: 9 bytes of memory for each byte of a u8 array
KEPT_HEADER_BYTES = 1 << 20  # the first window; a longer header is mapped whole


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: its name.
        shape: NumPy order (row length last); a scalar's shape is (1,).
        type: the block type.
        offset: bytes from the start of the file.
        nbytes: bytes of data, without padding.
        path: the file it lies in, absolute.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int
    path: Path

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """The layout of a GGUF file, or of a split model (see `gguforge.quant.splits`): its first file, and all tensors.

    Attributes:
        path: where it lies, absolute.
        version: 2 or 3.
        metadata: keys and values in file order.
        tensors: tensors in file order; of a split model, those of all files.
        alignment: bytes.
        data_offset: bytes from the start of the file to the data section.
        size: bytes of the file; of a split model, of all files.
        splits: the files of a split model; empty where there is one file.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    size: int
    splits: tuple[GGUFFile, ...] = ()

    def source(self, tensor: TensorInfo) -> FileSource:
        """The tensor as a source for a plan."""
        return FileSource(str(tensor.path), tensor.offset, tensor.shape, tensor.type)


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check the layout of a GGUF file.

    Raises:
        GGUFError: the file breaks a rule of the format, is cut short, or is no regular file.
        OSError: it cannot be opened.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise GGUFError("this is not a file", path=path, remedy="Give the path of a .gguf file.")
    reader = _Reader(path, status.st_size)
    try:
        return reader.read()
    finally:
        reader.close()


class _Reader:
    """A cursor over the header; every read goes through `take`, which knows how many bytes are left."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self._map(min(size, KEPT_HEADER_BYTES))

    def _map(self, nbytes: int) -> None:
        self.window = map_window(str(self.path), 0, nbytes).data

    def close(self) -> None:
        self.window.release()

    def fail(self, what: str, expected: object = None, found: object = None) -> GGUFError:
        remedy = "The file is damaged or not GGUF: download or make it again."
        return GGUFError(what, path=self.path, expected=expected, found=found, remedy=remedy)

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, nbytes: int, what: str) -> memoryview:
        """The next `nbytes` bytes; this is the one place that can run out of file."""
        if nbytes > self.left:
            raise self.fail(f"file ends inside {what}", expected=f"{nbytes} more bytes", found=f"{self.left}")
        end = self.position + nbytes
        if end > len(self.window):
            self._map(self.size if end > self.size // 2 else min(self.size, 4 * end))
        data = self.window[self.position : end]
        self.position = end
        return data

    def number(self, code: str, what: str) -> int:
        value = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        assert isinstance(value, int)
        return value

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"{what} is too long", expected=f"at most {limit} bytes", found=f"{length}")
        return str(self.take(length, what), "utf-8", "surrogateescape")

    def read(self) -> GGUFFile:
        version = self.start()
        n_tensors, n_pairs = self.number("Q", "the tensor count"), self.number("Q", "the metadata count")
        for what, count, least in (
            ("metadata", n_pairs, MIN_PAIR_BYTES),
            ("tensor", n_tensors, MIN_TENSOR_BYTES),
        ):
            if count * least > self.left:
                raise self.fail(f"{what} count is more than the file can hold", found=count)
        metadata = self.pairs(n_pairs)
        alignment = self.alignment(metadata)
        found = list(self.tensor_headers(n_tensors))
        data_offset = padded(self.position, alignment)
        tensors = tuple(self.placed(found, data_offset, alignment))
        return GGUFFile(self.path.absolute(), version, metadata, tensors, alignment, data_offset, self.size)

    def start(self) -> int:
        magic = bytes(self.take(min(4, self.left), "the magic"))
        if magic != MAGIC:
            raise GGUFError(
                "this is not a GGUF file",
                path=self.path,
                expected="the bytes 'GGUF' first",
                found=repr(magic),
            )
        version = self.number("I", "the version")
        if version in (2 << 24, 3 << 24):
            raise GGUFError(
                "big-endian GGUF is not supported",
                path=self.path,
                remedy="Convert the model again, little-endian.",
            )
        if version not in (2, 3):
            raise GGUFError("unknown GGUF version", path=self.path, expected="2 or 3", found=version)
        return version

    def pairs(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for index in range(count):
            key = self.text(f"metadata key {index}", MAX_KEY_BYTES)
            if not key:
                raise self.fail(f"metadata key {index} is empty")
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(key)
        return metadata

    def kind(self, what: str) -> GGUFValueType:
        number = self.number("I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.fail(f"{what} is unknown", found=number) from None

    def value(self, key: str) -> Value:
        what = f"the value of {key!r}"
        kind = self.kind(f"the type of {key!r}")
        if kind != GGUFValueType.ARRAY:
            return Value(kind, self.items(kind, 1, what)[0])
        item = self.kind(f"the element type of {key!r}")
        if item == GGUFValueType.ARRAY:
            raise self.fail(f"{what} is an array of arrays")
        count = self.number("Q", f"the length of {key!r}")
        if count > MAX_ITEMS:
            raise self.fail(f"{what} is too long", expected=f"at most {MAX_ITEMS} elements", found=count)
        return Value(kind, self.items(item, count, what), item)

    def items(self, kind: GGUFValueType, count: int, what: str) -> list[Scalar]:
        if kind == GGUFValueType.STRING:
            if count * 8 > self.left:
                raise self.fail(f"file ends inside {what}", expected=f"{count} strings", found=f"{self.left} bytes")
            return [self.text(what) for _ in range(count)]
        code = STRUCT_CODES[kind]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code), what)))

    def alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment")
        if value is None:
            return DEFAULT_ALIGNMENT
        number = value.value
        if value.kind != GGUFValueType.UINT32 or not isinstance(number, int):
            raise self.fail("general.alignment has the wrong type", expected="UINT32", found=value.kind.name)
        if not 1 <= number <= MAX_ALIGNMENT or number & (number - 1):
            raise self.fail(
                "general.alignment is no sound alignment",
                expected=f"a power of two up to {MAX_ALIGNMENT}",
                found=number,
            )
        return number

    def tensor_headers(self, count: int) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]:
        seen: set[str] = set()
        for index in range(count):
            name = self.text(f"the name of tensor {index}", MAX_NAME_BYTES)
            if name in seen:
                raise self.fail(f"tensor {name!r} appears twice")
            seen.add(name)
            yield name, self.shape(name), self.tensor_type(name), self.number("Q", f"the offset of {name!r}")

    def shape(self, name: str) -> tuple[int, ...]:
        n_dimensions = self.number("I", f"the dimensions of {name!r}")
        if n_dimensions > MAX_DIMENSIONS:
            raise self.fail(
                f"tensor {name!r} has too many dimensions",
                expected=f"at most {MAX_DIMENSIONS}",
                found=n_dimensions,
            )
        sizes = struct.unpack(f"<{n_dimensions}Q", self.take(8 * n_dimensions, f"the shape of {name!r}"))
        if prod(sizes) > MAX_ELEMENTS or max(sizes, default=0) > MAX_ELEMENTS:
            raise self.fail(f"tensor {name!r} is too large", found=" x ".join(map(str, sizes)))
        return tuple(sizes[::-1]) or (1,)

    def tensor_type(self, name: str) -> GGMLQuantizationType:
        number = self.number("I", f"the type of {name!r}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            kind = None
        if kind not in GGML_QUANT_SIZES:
            raise GGUFError(
                "unknown tensor type",
                path=self.path,
                tensor=name,
                found=number,
                remedy="A newer gguforge may know it.",
            )
        return kind

    def placed(
        self,
        found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
        data_offset: int,
        alignment: int,
    ) -> Iterator[TensorInfo]:
        """Check that the tensors lie one behind the other, each at the next aligned place, inside the file."""
        end, path = 0, self.path.absolute()
        for name, shape, kind, offset in found:
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block_size:
                raise self.fail(
                    f"rows of tensor {name!r} are no whole number of {kind.name} blocks",
                    found=f"{shape[-1]} elements",
                )
            if offset != end:
                raise self.fail(
                    f"tensor {name!r} is not where the one before it ends",
                    expected=f"offset {end}",
                    found=offset,
                )
            nbytes = prod(shape[:-1]) * (shape[-1] // block_size) * block_bytes
            if data_offset + offset + nbytes > self.size:
                raise self.fail(
                    f"file is cut short: tensor {name!r} ends behind the end of the file",
                    expected=f"{data_offset + offset + nbytes} bytes",
                    found=f"{self.size}",
                )
            yield TensorInfo(name, shape, kind, data_offset + offset, nbytes, path)
            end = padded(offset + nbytes, alignment)
