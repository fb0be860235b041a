"""A folder of soft targets: a manifest that says what they are, and shards (see `gguforge.distill.shards`).

The manifest is written first and never changed, so every process that works on the folder, on one machine or several,
writes the same one. Its key is a hash over all that decides a shard's bytes: teachers, tokenizer, text, settings. Each
shard carries that key and a hash of its own data; it appears under its name only when it is whole.

    targets/manifest.json
    targets/targets-00000-of-00012.safetensors
    ...

Example:
    targets = open_targets("targets/")
    for document in targets:
        scores = student(document.input_ids)[document.positions]  # one row of scores for each row of the targets
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.convert.json_file import read_object
from gguforge.distill.arrays import check_arrays, read_remarks
from gguforge.distill.shards import KINDS, Document, Kind, Layout, Shard
from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import replacing

FORMAT = "gguforge targets 1"
MANIFEST = "manifest.json"
KEY = "key"  # the remark of a shard that holds its manifest's key


@dataclass(frozen=True)
class TeacherRecord:
    """Who made the targets.

    Attributes:
        name: the file's or model's name.
        type: of its weights: Q8_0, BF16...
        engine: what computed it, with its version.
        sha256: identifies the weights.
        weight: its share of the mixture.
    """

    name: str
    type: str
    engine: str
    sha256: str
    weight: float


@dataclass(frozen=True)
class TextRecord:
    """A text file that was read; its size in bytes."""

    name: str
    sha256: str
    bytes: int


_NAMES_ONLY = ("name", "type", "engine")  # recorded, but not part of the key


@dataclass(frozen=True)
class Manifest:
    """What a folder of targets holds.

    Attributes:
        kind: "sampled", "top-k" or "full".
        size: draws of a sampled row, entries of a top-k row at most; 0 for full ones.
        draws: "independent" or "stratified" (see `gguforge.distill.sampling`); "" unless sampled.
        seed: of the draws.
        temperature: the teacher's scores were divided by it.
        biased: whether the entries are only a part of the distribution (top-k).
        context: tokens of a document at most.
        vocabulary: scores that the teacher gives one position.
        tokens: of these, how many the tokenizer can produce; the rest is padding.
        tokenizer_sha256: of the tokens' names (see `gguforge.distill.tokens`).
        template_sha256: of the chat template; "" when the text is plain.
        teachers: at least one.
        text: the files that were read, in order.
        shard_bytes: text that makes a shard.
        shards: how many there are.
    """

    kind: Kind
    size: int
    draws: str
    seed: int
    temperature: float
    biased: bool
    context: int
    vocabulary: int
    tokens: int
    tokenizer_sha256: str
    template_sha256: str
    teachers: tuple[TeacherRecord, ...]
    text: tuple[TextRecord, ...]
    shard_bytes: int
    shards: int

    @cached_property
    def key(self) -> str:
        """SHA-256, hexadecimal, over everything that decides the shards' bytes."""
        decisive = asdict(self)
        for record in (*decisive["teachers"], *decisive["text"]):
            for name in _NAMES_ONLY:
                record.pop(name, None)
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def layout(self) -> Layout:
        """What the rows of its shards hold."""
        return Layout(self.kind, self.size, self.vocabulary)

    def shard_name(self, number: int) -> str:
        """`targets-00003-of-00012.safetensors`."""
        return f"targets-{number:05d}-of-{self.shards:05d}.safetensors"

    def differences(self, other: Manifest) -> list[str]:
        """Names of the settings in which the two would give other shards."""
        ours, theirs = (json.loads(json.dumps(asdict(manifest))) for manifest in (self, other))
        for record in (r for side in (ours, theirs) for r in (*side["teachers"], *side["text"])):
            for name in _NAMES_ONLY:
                record.pop(name, None)
        return [name for name in ours if ours[name] != theirs[name]]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or see that the one that is there is the same.

    Raises:
        OutputError: the folder holds targets of other settings, or cannot be written.
    """
    path = folder / MANIFEST
    if not path.exists():
        text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2).encode() + b"\n"
        with replacing(path, len(text), overwrite=True) as part:
            part.write_bytes(text)
    there = read_manifest(folder)
    if there.key != manifest.key:
        raise OutputError(
            "holds targets that were made differently", path=folder,
            found=f"other {', '.join(there.differences(manifest))}",
            remedy="Give the same inputs and settings to go on with them, or choose another folder.",
        )  # fmt: skip


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError("holds no soft targets", path=folder, remedy="Make some with: gguforge distill collect")
    data = read_object(path)
    version = data.pop("format", None)
    if version != FORMAT:
        raise InputError(
            "is no manifest that this version reads", path=path, expected=repr(FORMAT), found=repr(version)
        )
    try:
        teachers = tuple(_record(TeacherRecord, item) for item in data.pop("teachers"))
        text = tuple(_record(TextRecord, item) for item in data.pop("text"))
        manifest: Manifest = _record(Manifest, {**data, "teachers": teachers, "text": text})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the manifest is damaged: {error}", path=path) from None
    return manifest


_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}


def _record(kind: type[Any], values: Any) -> Any:
    """The dataclass from a table with exactly its fields, each of its type.

    Raises:
        TypeError, ValueError: not so.
    """
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(kind)}:
        raise ValueError(f"{kind.__name__} has other fields")
    for field in fields(kind):
        wanted: Any = _TYPES.get(str(field.type))
        value = values[field.name]
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise ValueError(f"{field.name} is no {field.type}")
    if "kind" in values and values["kind"] not in KINDS:
        raise ValueError(f"kind {values['kind']!r} is unknown")
    return kind(**values)


class Targets(Sequence[Document]):
    """Soft targets that were opened: documents by number, in the order of the text.

    Attributes:
        folder: where they lie.
        manifest: what they are.
        shards: the opened files.
        tokens, rows, entries: how many there are in all.
        nbytes: of all shards.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> None:
        self.folder, self.manifest, self.shards = folder, manifest, tuple(shards)
        self._first = np.cumsum([0, *(shard.documents for shard in shards)]).tolist()
        self.tokens, self.rows, self.entries, self.nbytes = (
            sum(getattr(shard, name) for shard in shards) for name in ("tokens", "rows", "entries", "nbytes")
        )

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: Any) -> Any:
        """One document, or a list of them for a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number = range(len(self))[number]
        shard = bisect_right(self._first, number) - 1
        return self.shards[shard].document(number - self._first[shard])

    def __iter__(self) -> Iterator[Document]:
        for shard in self.shards:
            for number in range(shard.documents):
                yield shard.document(number)

    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy; see `teacher_loss`."""
        return teacher_loss(self.shards)


def teacher_loss(shards: Sequence[Shard]) -> float:
    """The teacher's cross-entropy on the tokens that count, in nats for each; those it said nothing of are left out."""
    known = [shard.next_log_prob[np.isfinite(shard.next_log_prob)].astype(np.float64) for shard in shards]
    return -sum(float(part.sum()) for part in known) / max(1, sum(map(len, known)))


def open_targets(folder: str | os.PathLike[str], *, verify: bool = True) -> Targets:
    """Open a folder of soft targets that is complete.

    Args:
        verify: compare every shard's data with its hash (about a second for a gigabyte).

    Raises:
        InputError: shards are missing, damaged, or belong to other targets.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    missing = [i for i in range(manifest.shards) if not (folder / manifest.shard_name(i)).exists()]
    if missing:
        raise InputError(
            f"{len(missing)} of {manifest.shards} shards are missing", path=folder,
            found=f"no {manifest.shard_name(missing[0])}", remedy="Run the same distill collect again to finish.",
        )  # fmt: skip
    return Targets(folder, manifest, [open_shard(folder, manifest, i, verify=verify) for i in range(manifest.shards)])


def open_shard(folder: Path, manifest: Manifest, number: int, *, verify: bool = True) -> Shard:
    """Open one shard that is there.

    Raises:
        InputError: it is damaged or belongs to other targets.
    """
    path = folder / manifest.shard_name(number)
    if read_remarks(path).get(KEY) != manifest.key:
        raise InputError("belongs to other targets than its folder's manifest", path=path, remedy="Delete it.")
    if verify:
        check_arrays(path)
    return Shard(path, manifest.layout)
