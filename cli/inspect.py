"""`gguforge inspect`: what is inside a GGUF file."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import in_words, table
from gguforge.quant.errors import InputError, printable

if TYPE_CHECKING:
    from gguforge.quant.metadata import Value
    from gguforge.quant.reader import GGUFFile
    from gguforge.quant.receipt import Receipt

SHOWN_ITEMS = 6
SHOWN_LETTERS = 72
TEMPLATE_KEY = "tokenizer.chat_template"


@click.command("inspect")
@click.argument("model", type=click.Path())
@click.option("--metadata", "only", flag_value="metadata", help="Print the metadata alone, arrays and texts in full.")
@click.option("--tensors", "only", flag_value="tensors", help="Print the tensors alone.")
@click.option("--template", "only", flag_value="template", help="Print the chat template alone.")
@click.option("--alone", is_flag=True, help="Show this file alone, though it be part of a split model.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(model: str, only: str | None, alone: bool, as_json: bool) -> None:
    """Show what is inside the GGUF file MODEL, reading its header alone. Of a split model, give the first file.

    \b
    Examples:
      gguforge inspect model.gguf
      gguforge inspect model.gguf --template
      gguforge inspect model.gguf --json | jq .metadata
    """
    from gguforge.quant.reader import read_gguf
    from gguforge.quant.splits import read_model

    file = read_gguf(model) if alone else read_model(model)
    if as_json:
        click.echo(json.dumps(describe(file), ensure_ascii=True, allow_nan=False))
    elif only == "metadata":
        click.echo(metadata_lines(file, full=True))
    elif only == "tensors":
        click.echo(tensor_lines(file))
    elif only == "template":
        print_template(file)
    else:
        click.echo(summary(file))


def print_template(file: GGUFFile) -> None:
    """The template byte for byte, so that it can be hashed and compared; in a terminal, without control characters.

    Raises:
        InputError: there is none.
    """
    text = template(file)
    if text is None:
        raise InputError("no chat template inside", path=file.path)
    if sys.stdout.isatty():
        click.echo("\n".join(printable(line) for line in text.split("\n")))
    else:
        click.echo(text.encode("utf-8", "surrogateescape"), nl=False)


def describe(file: GGUFFile) -> dict[str, Any]:
    """The whole layout as plain data."""
    text, errors = template(file), relative_errors(file)
    return {
        "path": str(file.path),
        "bytes": file.size,
        "files": [
            {"path": str(part.path), "bytes": part.size, "tensors": len(part.tensors)}
            for part in file.splits or (file,)
        ],
        "version": file.version,
        "alignment": file.alignment,
        "bits_per_weight": round(bits_per_weight(file), 4),
        "chat_template_sha256": template_hash(text) if text is not None else None,
        "receipt_digest": receipt.digest if (receipt := find_receipt(file)) is not None else None,
        "measured": [asdict(measured) for measured in receipt.measured] if receipt is not None else [],
        "metadata": {
            key: {"type": value.kind.name, "value": plain(value.value)}
            | ({"item": value.item.name} if value.item is not None else {})
            for key, value in file.metadata.items()
        },
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type.name, "offset": t.offset, "bytes": t.nbytes}
            | ({"file": t.path.name} if file.splits else {})
            | ({"relative_error": errors[t.name]} if t.name in errors else {})
            for t in file.tensors
        ],
    }


def plain(value: object) -> object:
    """A value as JSON can hold it, which knows no NaN and no infinity: they become text.

    >>> plain([1, float("-inf")])
    [1, '-inf']
    """
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def find_receipt(file: GGUFFile) -> Receipt | None:
    """The receipt beside the file, if there is one that can be read; `gguforge verify` checks it."""
    from gguforge.quant.receipt import read_receipt

    try:
        return read_receipt(file.path)
    except InputError:
        return None


def relative_errors(file: GGUFFile) -> dict[str, float]:
    """What receipts say of the error of each tensor that has there the type that it has in the file."""
    receipts = [found for part in file.splits or (file,) if (found := find_receipt(part)) is not None]
    types = {tensor.name: tensor.type.name for tensor in file.tensors}
    return {
        tensor.name: tensor.relative_error
        for receipt in receipts
        for tensor in receipt.tensors
        if tensor.relative_error is not None and types.get(tensor.name) == tensor.type
    }


def template(file: GGUFFile) -> str | None:
    """The default chat template."""
    value = file.metadata.get(TEMPLATE_KEY)
    return str(value.value) if value is not None else None


def template_hash(text: str) -> str:
    """Its SHA-256, by which two files can be compared."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def bits_per_weight(file: GGUFFile) -> float:
    """Tensor bits per weight over the whole file."""
    weights = sum(tensor.elements for tensor in file.tensors)
    return 8 * sum(tensor.nbytes for tensor in file.tensors) / weights if weights else 0.0


def summary(file: GGUFFile) -> str:
    """The page that `gguforge inspect MODEL` prints."""
    weights = sum(tensor.elements for tensor in file.tensors)
    head = [
        f"{printable(str(file.path))}",
        f"{file.size:,} bytes ({in_words(file.size)}), GGUF version {file.version}, alignment {file.alignment}",
        f"{weights:,} weights in {len(file.tensors)} tensors, {bits_per_weight(file):.2f} bits per weight",
    ]
    head += [f"{printable(p.path.name)}: {p.size:,} bytes, {len(p.tensors)} tensors" for p in file.splits]
    text = template(file)
    last = (
        f"Chat template: {len(text)} characters, sha256 {template_hash(text)}"
        if text is not None
        else "No chat template"
    )
    receipt = find_receipt(file)
    if receipt is not None:
        head.append(f"receipt by {printable(receipt.tool)}, digest {printable(receipt.digest)}")
        head += [f"receipt: {printable(measured.words())}" for measured in receipt.measured]
    parts = [
        "\n".join(head),
        "Metadata\n" + metadata_lines(file, full=False),
        "Types\n" + type_lines(file),
        "Tensors\n" + tensor_lines(file),
        last,
    ]
    return "\n\n".join(parts)


def metadata_lines(file: GGUFFile, full: bool) -> str:
    """Key, type and value, a line each."""
    rows = [["key", "type", "value"]]
    rows += [[printable(key), type_name(value), show(value, full)] for key, value in file.metadata.items()]
    return table(rows)


def type_name(value: Value) -> str:
    """The type of a value; for an array with its length.

    >>> from gguforge.quant.metadata import uint32
    >>> type_name(uint32(5))
    'UINT32'
    """
    if value.item is None:
        return value.kind.name
    assert isinstance(value.value, list)
    return f"{value.item.name}[{len(value.value)}]"


def show(value: Value, full: bool) -> str:
    """A value in one line, cut unless `full`."""
    if isinstance(value.value, list):
        items = value.value if full else value.value[:SHOWN_ITEMS]
        more = ", ..." if len(items) < len(value.value) else ""
        return "[" + ", ".join(show_scalar(item, full) for item in items) + more + "]"
    return show_scalar(value.value, full)


def show_scalar(value: object, full: bool) -> str:
    """One value: texts are made printable, floats short."""
    if isinstance(value, str):
        text = printable(value)
        return text if full or len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 3] + "..."
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def type_lines(file: GGUFFile) -> str:
    """Tensors, bytes and share of bytes by type."""
    count: dict[str, tuple[int, int]] = {}
    for tensor in file.tensors:
        n, nbytes = count.get(tensor.type.name, (0, 0))
        count[tensor.type.name] = n + 1, nbytes + tensor.nbytes
    total = sum(nbytes for _, nbytes in count.values()) or 1
    rows = [["type", "tensors", "bytes", "share"]]
    for name, (n, nbytes) in sorted(count.items(), key=lambda item: -item[1][1]):
        rows.append([name, str(n), f"{nbytes:,}", f"{100 * nbytes / total:.1f} %"])
    return table(rows, right=(1, 2, 3))


def tensor_lines(file: GGUFFile) -> str:
    """Name, type, shape and bytes, a line each, and the relative error where a receipt tells it."""
    rows = [["name", "type", "shape", "bytes"]]
    rows += [[printable(t.name), t.type.name, " x ".join(map(str, t.shape)), f"{t.nbytes:,}"] for t in file.tensors]
    errors = relative_errors(file)
    if errors:
        rows[0].append("error")
        for row, tensor in zip(rows[1:], file.tensors, strict=True):
            row.append(f"{errors[tensor.name]:.4g}" if tensor.name in errors else "")
    return table(rows, right=(3, 4) if errors else (3,))
