"""Importance matrices: for each matrix of a model, how strongly calibration text excites each of its input columns.

Reads and writes llama-imatrix's GGUF files and its older .dat files, merges them, says what they cover. It does not run
models (`gguforge.runtime.calibrate` does) and does not quantize. Formats: llama.cpp, tools/imatrix/imatrix.cpp
(save_imatrix, save_imatrix_legacy) and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.constants import GGMLQuantizationType, GGUFValueType
from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.files import replacing
from gguforge.quant.metadata import Value, array, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.reader import GGUFFile, TensorInfo, read_gguf
from gguforge.quant.sources import ArraySource
from gguforge.quant.writer import write

SUMS, COUNTS = ".in_sum2", ".counts"
REST = ".in_sum2_rest"  # ours, in the files of stopped runs; llama.cpp passes over it
LEGACY_SUFFIX = ".dat"
LEGACY_CHUNK = 512  # tokens; a .dat file counts chunks, and 512 is what llama-imatrix takes them for
PREFIX = "gguforge.imatrix."
TEXT_KEY, FINGERPRINT_KEY, MODEL_KEY = PREFIX + "text_sha256", PREFIX + "fingerprint", PREFIX + "model"

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Entry:
    """What was measured for one tensor.

    Attributes:
        sums: sums of squared inputs, shape (experts, columns). For a dense tensor there is one "expert"; if that tensor
            is a stack of matrices, `columns` counts those of all of them.
        counts: tokens that were summed, shape (experts,).
        rest: what float32 leaves of the sums, in two steps, shape (2, experts, columns); kept where a run is to go on.
    """

    sums: Floats
    counts: Counts
    rest: Floats | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of a tensor the text reached.

    Attributes:
        name: the tensor.
        experts: how many it has; 1 for a dense one.
        unused: numbers of the experts that no token was sent to.
        least, most: tokens that the least and the most used expert saw.
    """

    name: str
    experts: int
    unused: tuple[int, ...]
    least: int
    most: int


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """An importance matrix and where it came from.

    Attributes:
        entries: by tensor name.
        datasets: names of the text files.
        chunk_count: chunks of text that went in.
        chunk_size: tokens of a chunk.
        text_hashes: SHA-256 of each text file, hexadecimal; empty for a file that llama-imatrix wrote.
        fingerprint: hashes of some of the text's passages, by which overlap with another text is found.
        model: identifies the model that read the text; empty when unknown.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = LEGACY_CHUNK
    text_hashes: tuple[str, ...] = ()
    fingerprint: frozenset[int] = field(default=frozenset(), repr=False)
    model: str = ""

    def weights(self, name: str) -> Floats | None:
        """A tensor's importance weights as llama-quantize derives them: mean squares; 1 for experts never used.

        Returns:
            Shape (experts, columns), or None when the matrix does not know the tensor.

        Example: sums [[8, 2], [0, 0]] and counts [2, 0] -> [[4, 1], [1, 1]].
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        counts = entry.counts.astype(np.float32)[:, None]
        return np.where(counts > 0, entry.sums / np.maximum(counts, np.float32(1)), np.float32(1))

    def coverage(self) -> list[Coverage]:
        """For each tensor, in order of their names, which experts the text reached."""
        found = []
        for name in sorted(self.entries, key=str.encode):
            counts = self.entries[name].counts
            unused = tuple(int(i) for i in np.flatnonzero(counts == 0))
            found.append(Coverage(name, len(counts), unused, int(counts.min()), int(counts.max())))
        return found


def merge(matrices: Sequence[ImportanceMatrix], paths: Sequence[str] = ()) -> ImportanceMatrix:
    """Add several importance matrices of one model up.

    Args:
        matrices: at least one; the first gives the chunk size.
        paths: their names, for the error.

    Raises:
        InputError: a tensor has another size in one of them.
    """
    entries: dict[str, Entry] = {}
    for number, matrix in enumerate(matrices):
        for name, entry in matrix.entries.items():
            try:
                entries[name] = _added(entries[name], entry) if name in entries else replace(entry, rest=None)
            except ValueError as error:
                where = paths[number] if number < len(paths) else None
                raise InputError(
                    f"is of another model than the importance matrices before it: {error}", path=where, tensor=name
                ) from None
    size = matrices[0].chunk_size
    models = {matrix.model for matrix in matrices}
    return ImportanceMatrix(
        entries,
        datasets=tuple(name for matrix in matrices for name in matrix.datasets),
        chunk_count=max((int(entry.counts.max()) for entry in entries.values()), default=0) // size,
        chunk_size=size,
        text_hashes=tuple(dict.fromkeys(text for matrix in matrices for text in matrix.text_hashes)),
        fingerprint=frozenset[int]().union(*(matrix.fingerprint for matrix in matrices)),
        model=models.pop() if len(models) == 1 else "",
    )


def _added(one: Entry, other: Entry) -> Entry:
    """The sum; a single count of an older file stands for every expert."""
    if one.sums.size != other.sums.size:
        raise ValueError(f"{other.sums.size} values instead of {one.sums.size}")
    experts = max(len(one.counts), len(other.counts))
    if {len(one.counts), len(other.counts)} - {1, experts}:
        raise ValueError(f"{len(other.counts)} experts instead of {len(one.counts)}")
    shape = (experts, one.sums.size // experts)
    sums = one.sums.reshape(shape).astype(np.float64) + other.sums.reshape(shape)
    counts = np.broadcast_to(one.counts, (experts,)) + np.broadcast_to(other.counts, (experts,))
    return Entry(sums.astype(np.float32), counts)


def write_imatrix(matrix: ImportanceMatrix, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a GGUF file as llama-imatrix does, or its older format when the name ends in `.dat`.

    The GGUF file carries the text's hashes in keys of our own, behind llama.cpp's; a .dat file has no room for them.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
        DataError: a sum is not finite.
    """
    path = Path(path)
    if path.suffix == LEGACY_SUFFIX:
        data = _legacy_bytes(matrix)
        with replacing(path, len(data), overwrite) as part:
            part.write_bytes(data)
    else:
        write(plan_imatrix(matrix), path, workers=1, overwrite=overwrite)


def plan_imatrix(matrix: ImportanceMatrix) -> Plan:
    """The GGUF file: sums [columns, experts] and counts [1, experts] of each tensor, in order of their names."""
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array(GGUFValueType.STRING, matrix.datasets),
        "imatrix.chunk_count": uint32(matrix.chunk_count),
        "imatrix.chunk_size": uint32(matrix.chunk_size),
    } | overlap_metadata(matrix)
    if matrix.model:
        metadata[MODEL_KEY] = string(matrix.model)
    tensors = []
    for name in sorted(matrix.entries, key=str.encode):
        entry = matrix.entries[name]
        parts = {SUMS: entry.sums, COUNTS: entry.counts.astype(np.float32)[:, None], REST: entry.rest}
        for suffix, values in parts.items():
            if values is None:
                continue
            flat = values if len(values) > 1 else values[0]  # GGUF counts no trailing dimension of 1
            tensors.append(TensorPlan(name + suffix, flat.shape, GGMLQuantizationType.F32, ArraySource(flat)))
    return Plan(metadata, tuple(tensors))


def overlap_metadata(matrix: ImportanceMatrix, prefix: str = PREFIX) -> dict[str, Value]:
    """The keys by which overlap with another text is found, to be kept in this file or in a model made with it."""
    if not matrix.text_hashes:
        return {}
    return {
        f"{prefix}text_sha256": array(GGUFValueType.STRING, matrix.text_hashes),
        f"{prefix}fingerprint": array(GGUFValueType.UINT64, sorted(matrix.fingerprint)),
    }


def read_imatrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Read an importance matrix of either format.

    Raises:
        InputError: it is damaged, or something else; GGUFError when it is a GGUF file.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        magic = file.read(4)
    return _from_gguf(read_gguf(path)) if magic == b"GGUF" else _LegacyReader(path).read()


def _from_gguf(file: GGUFFile) -> ImportanceMatrix:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in file.tensors:
        for suffix in (SUMS, COUNTS, REST):
            if tensor.name.endswith(suffix):
                pairs.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor
    if not pairs:
        raise GGUFError(
            "is not an importance matrix", path=file.path, expected=f"tensors named *{SUMS}",
            remedy="Make one with: gguforge calibrate MODEL -f TEXT",
        )  # fmt: skip
    entries = {name: _entry(file, name, pair) for name, pair in pairs.items()}
    return ImportanceMatrix(
        entries,
        datasets=_texts(file, "imatrix.datasets"),
        chunk_count=_number(file, "imatrix.chunk_count", 0),
        chunk_size=_number(file, "imatrix.chunk_size", 1),
        text_hashes=_texts(file, TEXT_KEY) if TEXT_KEY in file.metadata else (),
        fingerprint=read_fingerprint(file, FINGERPRINT_KEY),
        model=str(file.metadata[MODEL_KEY].value) if MODEL_KEY in file.metadata else "",
    )


def _entry(file: GGUFFile, name: str, pair: Mapping[str, TensorInfo]) -> Entry:
    if SUMS not in pair or COUNTS not in pair:
        missing = COUNTS if SUMS in pair else SUMS
        raise GGUFError("is incomplete", path=file.path, tensor=name, expected=f"the tensor {name}{missing}")
    for info in pair.values():
        if info.type != GGMLQuantizationType.F32:
            raise GGUFError(
                "has the wrong type", path=file.path, tensor=info.name, expected="F32", found=info.type.name
            )
    sums, counts = (_values(file, pair[suffix]) for suffix in (SUMS, COUNTS))
    if not counts.size or not sums.size or sums.size % counts.size:
        raise GGUFError(
            "sums and counts do not fit each other", path=file.path, tensor=name,
            expected=f"a multiple of {counts.size} sums", found=sums.size,
        )  # fmt: skip
    entry = Entry(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64))
    if REST not in pair:
        return entry
    rest = _values(file, pair[REST], signed=True)
    if rest.size != 2 * sums.size:
        raise GGUFError("is damaged", path=file.path, tensor=name + REST, expected=2 * sums.size, found=rest.size)
    return replace(entry, rest=rest.reshape(2, counts.size, -1))


def _values(file: GGUFFile, info: TensorInfo, signed: bool = False) -> Floats:
    """A tensor in memory, flat; sums of squares and counts are finite and not negative."""
    values = np.array(file.source(info).rows(0, info.elements // max(1, info.shape[-1]))).reshape(-1)
    _check(np.abs(values) if signed else values, file.path, info.name)
    return values


def _check(values: Floats, path: Path, name: str) -> None:
    if values.size and not (np.isfinite(values.max()) and values.min() >= 0):
        raise InputError(
            "holds negative numbers, infinity or NaN", path=path, tensor=name,
            remedy="The file is damaged, or the model is: calibrate again.",
        )  # fmt: skip


def _number(file: GGUFFile, key: str, least: int) -> int:
    entry = file.metadata.get(key)
    if entry is None or entry.kind != GGUFValueType.UINT32 or not isinstance(entry.value, int) or entry.value < least:
        raise GGUFError(
            f"metadata key {key} is missing or wrong", path=file.path, expected=f"a whole number from {least} on",
            found=None if entry is None else repr(entry.value)[:40],
        )  # fmt: skip
    return entry.value


def _texts(file: GGUFFile, key: str) -> tuple[str, ...]:
    entry = file.metadata.get(key)
    if entry is None or entry.item != GGUFValueType.STRING or not isinstance(entry.value, list):
        raise GGUFError(f"metadata key {key} is missing or wrong", path=file.path, expected="a list of strings")
    return tuple(map(str, entry.value))


def read_fingerprint(file: GGUFFile, key: str) -> frozenset[int]:
    """The passage hashes kept under a metadata key; none when there is no such key.

    Raises:
        GGUFError: the key holds something else.
    """
    entry = file.metadata.get(key)
    if entry is None:
        return frozenset()
    if entry.item != GGUFValueType.UINT64 or not isinstance(entry.value, list):
        raise GGUFError(f"metadata key {key} is wrong", path=file.path, expected="a list of 64-bit numbers")
    return frozenset(map(int, entry.value))


def _legacy_bytes(matrix: ImportanceMatrix) -> bytes:
    """The .dat format: means times the number of chunks, experts never used as 1, tensors never used left out."""
    parts, count = [], 0
    for name in sorted(matrix.entries, key=str.encode):
        entry = matrix.entries[name]
        most = int(entry.counts.max())
        if not most:
            continue
        chunks = -(-most // matrix.chunk_size)
        means = matrix.weights(name)
        assert means is not None
        values = (means * np.float32(chunks)).astype("<f4").tobytes()
        text = name.encode()
        parts.append(struct.pack("<i", len(text)) + text + struct.pack("<ii", chunks, entry.sums.size) + values)
        count += 1
    dataset = matrix.datasets[-1].encode("utf-8", "surrogateescape") if matrix.datasets else b""
    tail = struct.pack("<ii", matrix.chunk_count, len(dataset)) + dataset
    return struct.pack("<i", count) + b"".join(parts) + tail


class _LegacyReader:
    """A cursor over a .dat file; every read goes through `take`, which knows how many bytes are left."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    def fail(self, what: str) -> InputError:
        return InputError(
            f"is not an importance matrix, or damaged: {what}", path=self.path,
            remedy="Make one with: gguforge calibrate MODEL -f TEXT",
        )  # fmt: skip

    def take(self, nbytes: int, what: str) -> bytes:
        if not 0 <= nbytes <= len(self.data) - self.position:
            raise self.fail(f"it ends inside {what}")
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def number(self, what: str, least: int) -> int:
        value = int.from_bytes(self.take(4, what), "little", signed=True)
        if value < least:
            raise self.fail(f"{what} is {value}")
        return value

    def read(self) -> ImportanceMatrix:
        entries: dict[str, Entry] = {}
        for index in range(self.number("the number of entries", 1)):
            what = f"entry {index}"
            name = self.name(what)
            if name in entries:
                raise self.fail(f"tensor {name!r} appears twice")
            chunks = self.number(f"the chunk count of {what}", 1)
            size = self.number(f"the size of {what}", 1)
            values = np.frombuffer(self.take(4 * size, f"the values of {what}"), "<f4").astype(np.float32)
            _check(values, self.path, name)
            sums = values[None, :] * np.float32(LEGACY_CHUNK)
            entries[name] = Entry(sums, np.array([chunks * LEGACY_CHUNK], np.int64))
        most = max(int(entry.counts[0]) for entry in entries.values())
        chunk_count = most // LEGACY_CHUNK
        datasets: tuple[str, ...] = ()
        if self.position < len(self.data):  # older files end here
            chunk_count = self.number("the chunk count", 0)
            datasets = self.dataset()
        if self.position < len(self.data):
            raise self.fail("bytes follow its end")
        return ImportanceMatrix(entries, datasets, chunk_count, LEGACY_CHUNK)

    def name(self, what: str) -> str:
        data = self.take(self.number(f"the name length of {what}", 1), f"the name of {what}")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the name of {what} is no text") from None

    def dataset(self) -> tuple[str, ...]:
        if self.position == len(self.data):
            return ()
        data = self.take(self.number("the length of the dataset's name", 0), "the dataset's name")
        return (data.decode("utf-8", "surrogateescape"),) if data else ()
