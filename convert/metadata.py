"""`general.*`: who made the model, what it is called, and how to sample from it.

Sources, strongest first: the caller's name, the model card (YAML front matter of README.md), `_name_or_path` of
config.json, the folder's name. The rules are those of llama.cpp's converter, so that both write the same; the meaning
of the keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#general-metadata
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import Json
from gguforge.convert.names import NameParts, parse_name, size_label, titled
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, array, float32, int32, string, uint32

FRONT_MATTER_LIMIT = 256 << 10
Warn = Callable[[str], None]

CARD_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
"""Fields of the model card by the key they fill, the first one present wins; in the order in which keys are written."""

WRITTEN_ORDER = (
    "name", "author", "version", "organization", "finetune", "basename", "description", "size_label",
    "license", "license.name", "license.link", "source.url", "source.doi", "source.uuid", "source.repo_url",
)  # fmt: skip

RELATED_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")

SAMPLING: dict[str, tuple[tuple[str, ...], Callable[..., Value]]] = {
    "top_k": (("top_k",), int32),
    "top_p": (("top_p",), float32),
    "min_p": (("min_p",), float32),
    "xtc_probability": (("xtc_probability",), float32),
    "xtc_threshold": (("xtc_threshold",), float32),
    "temp": (("temperature",), float32),
    "penalty_last_n": (("penalty_last_n",), int32),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), float32),
    "mirostat": (("mirostat",), int32),
    "mirostat_tau": (("mirostat_tau",), float32),
    "mirostat_eta": (("mirostat_eta",), float32),
}
"""`general.sampling.*` keys with the fields of generation_config.json they come from."""


@dataclass(frozen=True)
class _Texts:
    """What the names and the card say, before it becomes values."""

    own: dict[str, str]
    base_models: list[dict[str, str]] | None
    datasets: list[dict[str, str]] | None
    tags: list[str]
    languages: list[str]


def general_metadata(checkpoint: Checkpoint, parameters: int, model_name: str | None, warn: Warn) -> dict[str, Value]:
    """`general.type` and all of `general.sampling.*`, authorship, lineage, tags, in file order.

    Args:
        checkpoint: where the names and the card are.
        parameters: number of weights, for the size label.
        model_name: overrides every other name.
        warn: receives one line for each thing that cannot be read.
    """
    texts = _gather(checkpoint, _read_card(checkpoint, warn), parameters)
    if model_name is not None:
        texts.own["name"] = model_name
    texts.own.setdefault("name", checkpoint.name)
    texts.own.setdefault("size_label", size_label(parameters))
    pairs = {"type": string("model")} | _sampling(checkpoint, warn)
    pairs |= {key: string(texts.own[key]) for key in WRITTEN_ORDER if texts.own.get(key)}
    for key, related in (("base_model", texts.base_models), ("dataset", texts.datasets)):
        if related is not None:
            pairs[f"{key}.count"] = uint32(len(related))
            pairs |= {f"{key}.{i}.{field}": string(entry[field]) for i, entry in enumerate(related)
                      for field in RELATED_FIELDS if entry.get(field)}  # fmt: skip
    for key, words in (("tags", texts.tags), ("languages", texts.languages)):
        if words:
            pairs[key] = array(GGUFValueType.STRING, words)
    return {f"general.{key}": value for key, value in pairs.items()}


def _sampling(checkpoint: Checkpoint, warn: Warn) -> dict[str, Value]:
    """The recommended sampler settings of generation_config.json."""
    try:
        config = checkpoint.object("generation_config.json")
    except CheckpointError as error:
        warn(str(error))
        return {}
    pairs: dict[str, Value] = {}
    if isinstance(sequence := config.get("sequence"), str) and sequence:
        pairs["sampling.sequence"] = string(sequence)
    for key, (names, kind) in SAMPLING.items():
        number = next((config[name] for name in names if name in config), None)
        if number is None:
            continue
        whole = kind is int32
        wanted = "whole number" if whole else "number"
        if (
            isinstance(number, bool)
            or not isinstance(number, int if whole else int | float)
            or not abs(number) < 1 << 31
        ):
            warn(f"generation_config.json: {names[0]} = {str(number)[:40]!r} is no {wanted}; left out")
            continue
        pairs[f"sampling.{key}"] = kind(number)
    return pairs


def _read_card(checkpoint: Checkpoint, warn: Warn) -> Json:
    """The front matter of README.md; {} without one."""
    if not checkpoint.has("README.md"):
        return {}
    try:
        return front_matter(checkpoint.text("README.md"))
    except (CheckpointError, ValueError) as error:
        warn(f"README.md: model card not used: {error}")
        return {}


def front_matter(text: str) -> Json:
    """The YAML between the first two `---` lines of a model card.

    A lone `no` stays the language code, tabs count as two spaces; both occur in published cards.

    Raises:
        ValueError: it is too long, or not a YAML mapping.

    Example:
        >>> front_matter("---\\nlicense: mit\\nlanguage:\\n- no\\n---\\n# Hello")
        {'license': 'mit', 'language': ['no']}
    """
    import yaml  # comes with gguf; slow to import and seldom needed

    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return {}
    body = "\n".join(lines[1 : lines.index("---", 1)] if "---" in lines[1:] else lines[1:]) + "\n"
    if len(body) > FRONT_MATTER_LIMIT:
        raise ValueError(f"front matter of {len(body)} characters")
    try:
        card = yaml.safe_load(body.replace("- no\n", '- "no"\n').replace("\t", "  "))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if card is None:
        return {}
    if not isinstance(card, dict):
        raise ValueError(f"front matter is no mapping but {type(card).__name__}")
    return card


def _gather(checkpoint: Checkpoint, card: Json, parameters: int) -> _Texts:
    """Everything that the card and the names say, the card first."""
    own: dict[str, str] = {}
    for key, names in CARD_FIELDS.items():
        value = next((card[name] for name in names if card.get(name) is not None), None)
        if value is not None:
            own[key] = ",".join(map(_text, value)) if isinstance(value, list) else _text(value)
    path = checkpoint.config.get("_name_or_path")
    hub_names = [path] if isinstance(path, str) and path.count("/") <= 1 else []
    for name in [*hub_names, checkpoint.name]:
        for key, value in _from_name(parse_name(name, parameters)).items():
            own.setdefault(key, value)
    return _Texts(
        own,
        _related(card, ("base_model", "base_models", "base_model_sources"), parameters),
        _related(card, ("datasets", "dataset", "dataset_sources"), parameters),
        _words(card, "tags") + _words(card, "pipeline_tag"),
        _words(card, "languages") + _words(card, "language"),
    )


def _from_name(parts: NameParts) -> dict[str, str]:
    named = {
        "name": titled(parts.name),
        "organization": titled(parts.organization),
        "basename": parts.basename,
        "finetune": parts.finetune,
        "version": parts.version,
        "size_label": parts.size_label,
    }
    return {key: value for key, value in named.items() if value is not None}


def _related(card: Json, names: tuple[str, ...], parameters: int) -> list[dict[str, str]] | None:
    """The models or datasets that the card names as parents; None if it has no such field."""
    if not any(name in card for name in names):
        return None
    value = next((card[name] for name in names if name in card), None)
    entries = value if isinstance(value, list) else [] if value is None else [value]
    return [_related_entry(entry, parameters) for entry in entries if isinstance(entry, str | dict)]


def _related_entry(entry: str | Json, parameters: int) -> dict[str, str]:
    if isinstance(entry, dict):
        return {str(key): _text(value) for key, value in entry.items()}
    fields: dict[str, str | None] = {}
    if entry.startswith(("http://", "https://", "ssh://")):
        fields["repo_url"] = entry
        match = re.match(r"https?://huggingface.co/([^/]+/[^/]+)$", entry)
        parts = parse_name(match.group(1), parameters) if match else None
    else:
        parts = parse_name(entry, parameters)
    if parts is not None:
        fields |= {"name": titled(parts.name), "organization": titled(parts.organization), "version": parts.version}
        if "repo_url" not in fields and parts.organization is not None and parts.name is not None:
            fields["repo_url"] = f"https://huggingface.co/{parts.organization}/{parts.name}"
    return {key: value for key, value in fields.items() if value is not None}


def _words(card: Json, name: str) -> list[str]:
    value = card.get(name)
    return [value] if isinstance(value, str) else [_text(word) for word in value] if isinstance(value, list) else []


def _text(value: object) -> str:
    """A YAML value as text; strings as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)
