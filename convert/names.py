"""Reading model names such as `org/Name-7B-Instruct-v0.1`, and making file names from the parts.

The heuristics are llama.cpp's, so that both tools write the same metadata. Naming of files:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
ENCODING = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)


@dataclass(frozen=True)
class NameParts:
    """What a model's name says; None for what it does not say."""

    name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


@dataclass
class _Word:
    """One dash-separated word of a name with the roles it may play."""

    text: str
    roles: set[str] = field(default_factory=set)


def parse_name(name: str, parameters: int = 0) -> NameParts:
    """Take a model's name apart.

    Args:
        name: `model` or `owner/model`; a name with spaces is a sentence and not taken apart.
        parameters: number of weights; a number far from it is a context length, not a size.

    Example:
        >>> parts = parse_name("mistralai/Mistral-7B-Instruct-v0.2", 7_240_000_000)
        >>> parts.basename, parts.size_label, parts.finetune, parts.version
        ('Mistral', '7B', 'Instruct', 'v0.2')
    """
    if " " in name:
        return NameParts(name)
    organization, slash, model = name.partition("/")
    if not slash:
        organization, model = "", name
    owner = None if not slash or organization.startswith(".") else organization
    words = [_Word(text) for text in model.split("-") if text]
    for i, word in enumerate(words):
        _annotate(word, i > 0, parameters)
    if any(c.isdecimal() for word in words if "size" in word.roles for c in word.text):
        for word in words:
            if word.text.isalpha():
                word.roles.discard("size")  # "mini" beside "3.8B" is no size
    _find_basename(words)
    parts = {role: [word.text for word in words if role in word.roles] for role in ("basename", "size", "finetune")}
    version = "-".join(word.text for word in words if "version" in word.roles and "basename" not in word.roles) or None
    size, finetune = "-".join(dict.fromkeys(parts["size"])) or None, "-".join(parts["finetune"]) or None
    basename = "-".join(parts["basename"]) or None
    if size is None and finetune is None and version is None:
        basename = None  # too little to tell a base name from a whole name
    return NameParts(model, owner, basename, finetune, version, size)


def _annotate(word: _Word, not_first: bool, parameters: int) -> None:
    """Give a word the role that its looks suggest."""
    if VERSION.fullmatch(word.text):
        word.roles.add("version")
    elif ENCODING.fullmatch(word.text):
        word.roles.add("type")
        word.text = word.text.upper()
    elif not_first and SIZE.fullmatch(word.text):
        word.text, role = _size(word.text, parameters)
        word.roles.add(role)
    elif not_first and FINETUNE.fullmatch(word.text):
        word.roles.add("finetune")


def _size(text: str, parameters: int) -> tuple[str, str]:
    """A size with its unit in upper case, or a context length ("128k") with it in lower case.

    >>> _size("7b1", 7_100_000_000), _size("128k", 3_800_000_000)
    (('7.1B', 'size'), ('128k', 'finetune'))
    """
    text = text.replace("_", ".")
    if text[-1].isdecimal():  # 7b1 means 7.1b
        text = f"{text[:-2]}.{text[-1]}{text[-2]}"
    if len(text) > 1 and text[-2].isdecimal() and text[-1] in "kmbt":
        text = text[:-1] + text[-1].upper()
    try:
        labelled = float(text[:-1]) * 1000.0 ** " KMBT".find(text[-1])
    except ValueError:
        return text, "size"  # "small", "8x7B"
    if parameters > 0 and abs(labelled - parameters) > 7 * parameters // 8:
        return text[:-1] + text[-1].lower(), "finetune"
    return text, "size"


def _find_basename(words: list[_Word]) -> None:
    """The base name is the leading run of plain words and versions, less trailing versions."""
    at_start = True
    for word in words:
        if at_start and ((not word.roles and word.text[0].isalpha()) or "version" in word.roles):
            word.roles.add("basename")
        else:
            at_start = False
            if not word.roles:
                word.roles.add("finetune")
    for word in reversed(words):
        if "basename" not in word.roles or len(word.roles) == 1:
            break
        word.roles.remove("basename")


def titled(name: str | None) -> str | None:
    """A name as a title: dashes become spaces, plain lower-case words are capitalised.

    >>> titled("prose-8m-v2")
    'Prose 8m v2'
    """
    if name is None:
        return None
    words = name.strip().replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.match(r"(v\d+(?:\.\d+)*|\d.*)$", word) else word for word in words
    )


def size_label(parameters: int) -> str:
    """A number of weights with two digits at least.

    >>> size_label(8_391_936), size_label(1_235_814_432)
    ('8.4M', '1.2B')
    """
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    scale, unit = next((pair for pair in units if parameters > pair[0]), units[-1])
    scaled = parameters * (1 / scale)
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{unit}"


def file_name(texts: Mapping[str, str], type_name: str) -> str:
    """The name that the GGUF naming convention gives a model: base, size, fine-tune, version, type.

    Args:
        texts: `name` and, where known, `basename`, `size_label`, `finetune`, `version`.
        type_name: for example Q4_K_M.

    Example:
        >>> file_name({"basename": "Mistral", "size_label": "7B", "version": "v0.2"}, "Q4_K_M")
        'Mistral-7B-v0.2-Q4_K_M.gguf'
    """
    stem = [texts.get("basename") or texts.get("name") or "model"]
    stem += [texts[key] for key in ("size_label", "finetune", "version") if texts.get(key)]
    joined = "-".join("-".join(word.strip().split()) for word in [*stem, type_name])
    return re.sub(r"[^\w.+-]", "-", joined).lstrip(".-") + ".gguf"
