"""What decides a result, as plain values to be compared and hashed: settings as they are, paths by what they hold.

So a folder that was moved or named otherwise is the same, and a file with other contents under the same name is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguforge.distill.recipe import Recipe
from gguforge.distill.schema import Place
from gguforge.quant.errors import InputError
from gguforge.quant.splits import read_model

LATER = ("hardware", "report", "generate", "collect", "finish", "output")
"""Tables that do not change what a step of training computes: where it runs, and what is made before and after."""


def described(value: Any) -> Any:
    """A value as JSON takes it: tables as objects, paths as what they hold, addresses as they are.

    Raises:
        InputError: a path leads nowhere, or to what cannot be read.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, Place) and "://" not in value):
        return contents(Path(value))
    return value


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON takes, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the weights of a seed's run; errors as `described`."""
    tables = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in LATER}
    found: dict[str, Any] = described(tables)
    del found["schedule"]["seeds"]
    return found


def recipe_key(recipe: Recipe) -> str:
    """A hash over `decisive`."""
    return digest(decisive(recipe))


def contents(path: Path) -> str:
    """A hash of what a path holds: a GGUF file, soft targets, a checkpoint or a tokenizer, or any other file.

    Of weights, names, shapes and the first bytes of each tensor count.

    Raises:
        InputError: it is none of these.
    """
    from gguforge.distill.targets import MANIFEST, read_manifest
    from gguforge.runtime.calibrate import model_identity

    if (path / MANIFEST).is_file():
        return read_manifest(path).key
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError("there is no such file or folder", path=path)
    if path.suffix == ".gguf":
        return model_identity(read_model(path))
    found = path.stat()
    return _file(path.absolute(), found.st_size, found.st_mtime_ns)


def _folder(path: Path) -> str:
    """Of a checkpoint, or of a tokenizer by itself."""
    from gguforge.convert.checkpoint import read_checkpoint
    from gguforge.distill.students import TOKENIZER_FILES
    from gguforge.distill.teachers.checkpoint import identity

    weights = identity(read_checkpoint(path)) if any(path.glob("*.safetensors")) else ""
    files = [path / name for name in ("config.json", *TOKENIZER_FILES)]
    return digest([weights, *([file.name, contents(file)] for file in files if file.is_file())])


@lru_cache(maxsize=256)
def _file(path: Path, size: int, changed: int) -> str:
    """Of the bytes of a file, read once as long as its size and time stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
