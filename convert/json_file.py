"""JSON files from strangers: size cap, nesting guard, one error class.

Numbers keep Python's reading (NaN and Infinity included, which some configs hold); the strict rules for safetensors
headers live in `gguforge.convert.safetensors`.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from gguforge.quant.errors import CheckpointError

CONFIG_LIMIT = 16 << 20
"""Bytes that a configuration file may have."""

TOKENIZER_LIMIT = 256 << 20
"""Bytes that a tokenizer.json may have; the largest in the wild have about 35 MB."""

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""What every escaped surrogate looks like, paired or not."""

Json = dict[str, Any]


def objects(value: object) -> list[Json]:
    """The objects of a JSON list; none if it is no list.

    >>> objects([{"id": 1}, 2]), objects(True)
    ([{'id': 1}], [])
    """
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def read_text(path: Path, limit: int = CONFIG_LIMIT) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes.

    Raises:
        CheckpointError: it is no regular file, too large, or not UTF-8.
        OSError: it cannot be opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("this is not a regular file", path=path)
    if status.st_size > limit:
        raise CheckpointError(
            "file is too large", path=path, expected=f"at most {limit} bytes", found=f"{status.st_size} bytes"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "text is not UTF-8", path=path, found=f"byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None


def read_object(path: Path, limit: int = CONFIG_LIMIT) -> Json:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is not JSON, or holds something other than an object.
    """
    value = _read(path, limit)
    if not isinstance(value, dict):
        raise CheckpointError("unexpected JSON", path=path, expected="an object", found=type(value).__name__)
    return value


def read_list(path: Path, limit: int = CONFIG_LIMIT) -> list[Json]:
    """The objects of the JSON list in a file.

    Raises:
        CheckpointError: the file is not JSON, or holds something other than a list.
    """
    value = _read(path, limit)
    if not isinstance(value, list):
        raise CheckpointError("unexpected JSON", path=path, expected="a list", found=type(value).__name__)
    return objects(value)


def _read(path: Path, limit: int) -> Any:
    text = read_text(path, limit)
    try:
        value = json.loads(text)
        if HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "this is not JSON", path=path, found=str(error), remedy="Download the file again."
        ) from None
    return value
