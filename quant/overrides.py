"""What the user writes to override a preset: REGEX=TYPE words, type names, KEY=TYPE:VALUE metadata.

Unlike llama-quantize, a pattern keeps its case: lowering it would turn \\D into \\d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from gguforge.quant.blocks import REGISTRY
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.errors import InputError
from gguforge.quant.metadata import Value, boolean, float32, string, uint32
from gguforge.quant.rule_tables import RuleTable
from gguforge.quant.rules import Overrides

TRUTH = {"true": True, "false": False}


def parse_type(name: str) -> GGMLQuantizationType:
    """A block type by its name, in any case.

    Raises:
        InputError: no such type; names the nearest.

    Example:
        >>> parse_type("q6_k").name
        'Q6_K'
    """
    known = {kind.name: kind for kind in REGISTRY}
    found = known.get(name.strip().upper())
    if found is None:
        near = get_close_matches(name.upper(), known, 3, 0.5)
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known))}."
        raise InputError(f"unknown block type {name!r}", remedy=remedy)
    return found


def parse_pattern(word: str) -> tuple[re.Pattern[str], GGMLQuantizationType]:
    """One REGEX=TYPE word.

    Raises:
        InputError: it has no such form, or the expression or the type is wrong.
    """
    pattern, separator, type = word.rpartition("=")
    if not separator or not pattern or not type:
        raise InputError(f"{word!r} is no tensor type", expected="REGEX=TYPE, for example ffn_down=Q6_K")
    try:
        return re.compile(pattern), parse_type(type)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from None


def parse_overrides(
    words: Iterable[str] = (),
    file: str | None = None,
    *,
    output: str | None = None,
    embedding: str | None = None,
    keep_output: bool = False,
    pure: bool = False,
    table: RuleTable | None = None,
) -> Overrides:
    """The overrides that command-line words, and the words of a file, stand for."""
    listed = [*words, *(Path(file).read_text(encoding="utf-8").split() if file is not None else [])]
    return Overrides(
        pure=pure,
        keep_output=keep_output,
        output=None if output is None else parse_type(output),
        embedding=None if embedding is None else parse_type(embedding),
        patterns=tuple(map(parse_pattern, listed)),
        table=table,
    )


def parse_pairs(words: Iterable[str]) -> dict[str, Value]:
    """Metadata from KEY=TYPE:VALUE words; an int becomes an unsigned 32-bit number, as in llama-quantize.

    Raises:
        InputError: a word has no such form, or the value is not of its type.

    Example:
        >>> parse_pairs(["llama.block_count=int:12"])["llama.block_count"].value
        12
    """
    return dict(map(_pair, words))


def _pair(word: str) -> tuple[str, Value]:
    key, _, rest = word.partition("=")
    kind, separator, text = rest.partition(":")
    try:
        if not key or not separator:
            raise ValueError
        match kind:
            case "int":
                number = abs(int(text))
                if number >= 2**32:
                    raise ValueError
                return key, uint32(number)
            case "float":
                return key, float32(float(text))
            case "bool":
                return key, boolean(TRUTH[text])
            case "str":
                return key, string(text)
            case _:
                raise ValueError
    except (ValueError, KeyError):
        expected = "KEY=TYPE:VALUE with type int, float, bool (true, false) or str"
        raise InputError(f"{word!r} is no metadata", expected=expected) from None
