"""Receipts: what a model file is made of, in a JSON file beside it, by which it can be checked.

`NAME.gguf.json` holds hashes of the header and of every tensor, the type of each and the rule that chose it, what the
file was made from and with which settings. It holds no times, paths or names of machines: the same work gives the same
receipt. `gguforge.quant.verification` checks a file against it. The format is described in docs/reproducible.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gguforge.quant.errors import InputError, OutputError
from gguforge.quant.files import replacing, write_at
from gguforge.quant.following import tool_version
from gguforge.quant.plan import Plan
from gguforge.quant.provenance import Measurement, identify
from gguforge.quant.writer import Written

FORMAT = 1
LARGEST = 1 << 28  # bytes


@dataclass(frozen=True)
class TensorReceipt:
    """One tensor.

    Attributes:
        name, type: as in the file.
        shape: NumPy order, row length last.
        source_type: the type it was made from.
        rule: why it has its type.
        importance: SHA-256 of the importance that guided the encoder, as little-endian float32; None without.
        sha256: of its bytes, without padding.
        relative_error: RMS(decoded - source) / RMS(source) on sampled rows, see `gguforge.quant.relative_error`; None
            where it is not known.
    """

    name: str
    type: str
    shape: list[int]
    source_type: str
    rule: str
    importance: str | None
    sha256: str
    relative_error: float | None = None

    def __post_init__(self) -> None:
        error = self.relative_error
        if error is not None and not (isinstance(error, int | float) and 0 <= error < math.inf):
            raise ValueError("relative_error")
        if not isinstance(self.name, str):
            raise TypeError("name")


@dataclass(frozen=True)
class Receipt:
    """What a file is made of.

    Attributes:
        tool: name and version of the program.
        command: `quantize` or `convert`; empty where a program called the library.
        settings: options that differ from their defaults; of a path, the name alone.
        sources: what was read, by file name: bytes, and `sample_sha256` over the beginning of the file and of each
            tensor in it.
        bytes: size of the file.
        header_sha256: of all before the tensors.
        digest: SHA-256 over that of the header and those of the tensors, 32 bytes each, in file order.
        tensors: in file order.
        measured: how near the file is to another, as far as that was measured.
        gguforge_receipt: version of this format.
    """

    tool: str
    command: str
    settings: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    bytes: int
    header_sha256: str
    digest: str
    tensors: list[TensorReceipt]
    measured: list[Measurement] = field(default_factory=list)
    gguforge_receipt: int = field(default=FORMAT)


def receipt_path(model: str | os.PathLike[str]) -> Path:
    """Where the receipt of a model file lies."""
    return Path(f"{os.fspath(model)}.json")


def make_receipt(plan: Plan, written: Written, command: str = "", settings: Mapping[str, Any] | None = None) -> Receipt:
    """The receipt of a file that was just written; reads a little of the sources."""
    tensors = [
        TensorReceipt(
            tensor.name,
            tensor.type.name,
            list(tensor.shape),
            tensor.source.stored.type.name,
            tensor.reason,
            None if tensor.importance is None else _sha256(tensor.importance.astype("<f4").tobytes()),
            sha256,
            error,
        )
        for tensor, sha256, error in zip(plan.tensors, written.tensors, written.errors, strict=True)
    ]
    return Receipt(
        tool_name(),
        command,
        dict(settings or {}),
        sources_of(plan),
        plan.size,
        _sha256(plan.header),
        written.digest,
        tensors,
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tool_name() -> str:
    """The program and its version."""
    return f"gguforge {tool_version()}"


def sources_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """The files that a plan reads, by name; of each a little is read."""
    found = {}
    for path in sorted({path for tensor in plan.tensors for path in tensor.source.paths}):
        stored = [tensor.source.stored for tensor in plan.tensors if path in tensor.source.paths]
        found[Path(path).name] = identify(path, [one.extent.offset for one in stored if one.extent is not None])
    return found


def check_place(model: Path) -> None:
    """Refuse early what is no place for a receipt.

    Raises:
        OutputError: another kind of file has the receipt's name.
    """
    path = receipt_path(model)
    if not path.exists():
        return
    try:
        read_receipt(model)
    except InputError:
        raise OutputError(
            "this file is in the way: it is no receipt of ours",
            path=path,
            remedy="Move it away, write to another name, or pass --no-receipt.",
        ) from None


def write_receipt(receipt: Receipt, model: Path) -> None:
    """Write it beside the model."""
    facts = asdict(receipt)
    text = json.dumps({"gguforge_receipt": facts.pop("gguforge_receipt"), **facts}, indent=1)
    data = text.encode() + b"\n"
    with replacing(receipt_path(model), len(data), overwrite=True) as part:
        descriptor = os.open(part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            write_at(descriptor, 0, data)
        finally:
            os.close(descriptor)


def add_measurement(model: Path, header: bytes, measured: Measurement) -> None:
    """Note a measurement in the receipt beside a model; one of the same text and reference gives way to it.

    Args:
        model: the file.
        header: all before its tensors.
        measured: what was found.

    Raises:
        InputError: there is no receipt, or it is of another file.
    """
    receipt = read_receipt(model)
    if receipt is None or (receipt.bytes, receipt.header_sha256) != (os.stat(model).st_size, _sha256(header)):
        raise InputError(
            "no receipt of this file" if receipt is None else "is the receipt of another file",
            path=receipt_path(model), remedy="gguforge quantize and convert write one beside the file.",
        )  # fmt: skip
    others = [one for one in receipt.measured if _subject(one) != _subject(measured)]
    write_receipt(replace(receipt, measured=[*others, replace(measured, digest=receipt.digest)]), model)


def _subject(measured: Measurement) -> tuple[object, ...]:
    return measured.text_sha256, measured.skip, measured.chunks, measured.context, measured.against_sha256


def remove_receipt(model: Path) -> None:
    """Remove the receipt of an older file of that name; what is no receipt stays."""
    with contextlib.suppress(InputError):
        if read_receipt(model) is not None:
            receipt_path(model).unlink()


def read_receipt(model: Path) -> Receipt | None:
    """The receipt beside a model file; None if there is none.

    Raises:
        InputError: what is there is no receipt that this version reads.
    """
    path = receipt_path(model)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    try:
        facts = json.loads(data)
        known = facts["gguforge_receipt"]
        tensors = [TensorReceipt(**tensor) for tensor in facts.pop("tensors")]
        measured = [Measurement(**found) for found in facts.pop("measured")]
        receipt = Receipt(**facts, tensors=tensors, measured=measured)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            "is no receipt", path=path, remedy="Move it away; it is not needed to use the model."
        ) from None
    if known != FORMAT:
        raise InputError("receipt of another version", path=path, expected=FORMAT, found=repr(known)[:20])
    return receipt
