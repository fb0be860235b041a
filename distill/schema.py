"""A closed schema for TOML: every table is a dataclass, every key a field of it, and nothing else is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gguforge.quant.errors import InputError


class Place(str):
    """A path, or an address such as `http://host/v1#model`."""


def read_table(kind: type[Any], table: Mapping[str, Any], where: str, path: Path) -> Any:
    """A dataclass from a table.

    Args:
        kind: the dataclass; its fields may be numbers, texts, truths, paths, `Place`, `Literal`, lists and tables.
        table: what TOML gave.
        where: what to put before a key in messages, for example `data.`.
        path: the file, to whose folder paths are relative.

    Raises:
        InputError: a key is unknown or missing, or a value is of another type.
    """
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(hints)}."
            raise InputError(f"unknown key {where + key!r}", path=path, remedy=remedy)
    missing = [one.name for one in fields(kind) if one.name not in table and _is_required(one)]
    if missing:
        raise InputError(f"key {where + missing[0]!r} is missing", path=path)
    return kind(**{key: _value(hints[key], value, where + key, path) for key, value in table.items()})


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    Place: "a path or an address",
}


def _value(hint: Any, value: Any, where: str, path: Path) -> Any:
    """A value as its field wants it."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    options = tuple(option for option in options if option is not type(None))
    for option in options:
        if is_dataclass(option) and isinstance(value, dict):
            return read_table(option, value, where + ".", path)  # type: ignore[arg-type]
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_value(get_args(option)[0], item, where, path) for item in value)
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is Path and isinstance(value, str):
            return path.parent / value
        if option is Place and isinstance(value, str):
            return Place(value if "://" in value else path.parent / value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (int, bool, str) and type(value) is option:
            return value
    raise InputError(f"key {where!r}", path=path, expected=" or ".join(map(_described, options)), found=repr(value))


def _described(option: Any) -> str:
    if is_dataclass(option):
        return "a table"
    if get_origin(option) is tuple:
        return "a list"
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    return NAMES[option]
