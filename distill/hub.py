"""Data sets of the Hugging Face Hub as .jsonl files, in the two forms that `gguforge.distill.data` reads.

A data set is named `hub:OWNER/NAME`, `hub:OWNER/NAME:SPLIT` or `hub:OWNER/NAME:SPLIT:CONFIGURATION`. Its rows are
copied once into the targets' folder, so that what was read stays there and has a hash. Understood are the columns
`text`, `messages`, `conversations` (from, value), and `prompt` or `instruction` (with `input`) together with
`completion`, `response` or `output`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguforge.quant.errors import InputError, MissingExtraError
from gguforge.quant.files import part_of

PREFIX = "hub:"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_ASKED, _ANSWERED = ("prompt", "instruction"), ("completion", "response", "output")


def local_text(paths: Sequence[str | os.PathLike[str]], folder: Path) -> list[str]:
    """The paths, data sets replaced by files in the folder; those that are there already are not fetched again.

    Raises:
        InputError: a data set is not there or has no column that is understood.
        MissingExtraError: the package `datasets` is not installed.
    """
    return [_fetched(str(path), folder) if str(path).startswith(PREFIX) else str(path) for path in paths]


def _fetched(name: str, folder: Path) -> str:
    owner_and_name, _, rest = name.removeprefix(PREFIX).partition(":")
    split, _, configuration = rest.partition(":")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", owner_and_name):
        raise InputError("is no data set", path=name, expected="hub:OWNER/NAME or hub:OWNER/NAME:SPLIT")
    target = folder / (
        re.sub(r"\W+", "-", f"{owner_and_name}-{split or 'train'}-{configuration}").strip("-") + ".jsonl"
    )
    if not target.exists():
        folder.mkdir(exist_ok=True)
        part = part_of(target)
        with part.open("w", encoding="utf-8") as file:
            for number, row in enumerate(_rows(owner_and_name, split or "train", configuration or None)):
                file.write(json.dumps(_line(row, number, name), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    return str(target)


def _rows(name: str, split: str, configuration: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise MissingExtraError("datasets", "hub") from None
    try:
        return load_dataset(name, configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot be fetched: {str(error).splitlines()[0]}", path=PREFIX + name) from error


def _line(row: Mapping[str, Any], number: int, name: str) -> dict[str, Any]:
    """A row as a line.

    >>> _line({"instruction": "Add.", "input": "1 2", "output": "3"}, 0, "")["messages"][0]["content"]
    'Add.\\n\\n1 2'

    Raises:
        InputError: it has no column that is understood.
    """
    try:
        if row.get("messages"):
            return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
        if row.get("conversations"):
            return {"messages": [{"role": _ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]]}
        asked = next((row[column] for column in _ASKED if column in row), None)
        answered = next((row[column] for column in _ANSWERED if column in row), None)
        if isinstance(asked, str) and isinstance(answered, str):
            question = f"{asked}\n\n{row['input']}" if row.get("input") else asked
            return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]}
        if isinstance(row.get("text"), str):
            return {"text": row["text"]}
    except (KeyError, TypeError):
        pass
    raise InputError(
        f"row {number} is neither text nor a conversation", path=name,
        expected="a column text, messages, conversations, or prompt and completion", found=", ".join(row),
    )  # fmt: skip
