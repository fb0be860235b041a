"""Special token ids, the flags that put them around a text, and chat templates.

Sources, strongest first: tokenizer.json's post-processor and added tokens, tokenizer_config.json, config.json. The
rules are those of llama.cpp's converter. One id is written per role: further end-of-turn ids in generation_config.json
have no key in GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import Json, objects
from gguforge.quant.constants import GGUFValueType
from gguforge.quant.metadata import Value, array, boolean, string, uint32

Warn = Callable[[str], None]

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # llama.cpp spells it so
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
FLAG_ROLES = ("bos", "eos", "sep")


@dataclass
class _Roles:
    """The names of special tokens and the flags, as they are being found out."""

    names: dict[str, str]
    flags: dict[str, bool] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)  # eot, eom: where a template's last token displaced the eos


def special_metadata(checkpoint: Checkpoint, tokenizer: Json, vocab_size: int, warn: Warn) -> dict[str, Value]:
    """Ids and flags, in file order.

    Args:
        checkpoint: holds tokenizer_config.json and config.json.
        tokenizer: tokenizer.json, {} if there is none.
        vocab_size: ids must be below it.
        warn: receives one line for each entry that cannot be used.
    """
    config = checkpoint.object("tokenizer_config.json")
    roles = _Roles({role: text for role in ROLES if (text := content(config.get(f"{role}_token"))) is not None})
    if tokenizer:
        _borrow(roles)
        for processor in _processors(tokenizer):
            _read_processor(roles, processor, bool(config), warn)
    ids: dict[str, int] = {}
    if config:
        entries = reversed(objects(tokenizer.get("added_tokens")))  # the first of equal texts counts
        known = {entry["content"]: entry.get("id") for entry in entries if isinstance(entry.get("content"), str)}
        for role in (*ROLES, *roles.extra):
            if isinstance(flag := config.get(f"add_{role}_token"), bool):
                roles.flags.setdefault(role, flag)
            if role in roles.names:
                _set_id(ids, role, known.get(roles.names[role]), vocab_size, warn)
    for role in (*ROLES, *roles.extra):
        _set_id(ids, role, checkpoint.config.get(f"{role}_token_id"), vocab_size, warn)
    pairs = {ID_KEYS[role]: uint32(i) for role, i in ids.items() if role in ID_KEYS}
    pairs |= {f"add_{role}_token": boolean(flag) for role, flag in roles.flags.items() if role in FLAG_ROLES}
    return {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}


def content(entry: object) -> str | None:
    """The text of a special token's entry, which is a string or an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _set_id(ids: dict[str, int], role: str, i: Any, vocab_size: int, warn: Warn) -> None:
    if type(i) is not int:
        return  # absent, or a list of ids
    if not 0 <= i < vocab_size:
        warn(f"{role}_token_id {i} is outside the vocabulary of {vocab_size}; left out")
        return
    ids.setdefault(role, i)


def _borrow(roles: _Roles) -> None:
    """BERT-like tokenizers name only cls and sep; they serve as bos and eos."""
    for role, lender in (("bos", "cls"), ("eos", "sep")):
        if role not in roles.names and lender in roles.names:
            roles.names[role] = roles.names[lender]


def _processors(tokenizer: Json) -> list[Json]:
    processor = tokenizer.get("post_processor")
    if not isinstance(processor, dict):
        return []
    return objects(processor["processors"]) if "processors" in processor else [processor]


def _read_processor(roles: _Roles, processor: Json, has_config: bool, warn: Warn) -> None:
    kind = processor.get("type")
    if kind == "ByteLevel":
        roles.flags.setdefault("bos", False)
        roles.flags.setdefault("eos", False)
    elif kind == "RobertaProcessing":
        roles.flags |= {"bos": True, "eos": True, "sep": True}
        for role in ("cls", "sep"):
            pair = processor.get(role)
            if has_config and isinstance(pair, list) and pair and isinstance(pair[0], str):
                roles.names.setdefault(role, pair[0])
    elif kind == "TemplateProcessing":
        _read_template(roles, processor, has_config, warn)


def _read_template(roles: _Roles, processor: Json, has_config: bool, warn: Warn) -> None:
    """What a template puts before and after a text, and between two texts."""
    single, pair = (objects(processor.get(name)) for name in ("single", "pair"))
    first = last = None
    if len(single) > 1:
        if first := _special(single[0]):
            _read_first(roles, first, has_config, warn)
        if last := _special(single[-1]):
            _read_last(roles, last, has_config)
    if pair and first and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special(pair[-1]) == last:
        pair = pair[:-1]
    ends = [
        part["Sequence"].get("id") if isinstance(part.get("Sequence"), dict) else None
        for part in (pair[:1] + pair[-1:])
    ]
    between = pair[1:-1]
    if ends != ["A", "B"] or not between:
        return
    separators = [name for name in (roles.names.get("sep"), roles.names.get("eos")) if name]
    adds = not last and _special(between[0]) in separators
    if len(between) == 2 and _special(between[1]) in separators:
        adds = True
    roles.flags["sep"] = adds
    if adds and has_config and "eos" in roles.names:
        roles.names.setdefault("sep", roles.names["eos"])


def _special(part: Json) -> str | None:
    entry = part.get("SpecialToken")
    name = entry.get("id") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _read_first(roles: _Roles, first: str, has_config: bool, warn: Warn) -> None:
    if not has_config:
        roles.names["bos"] = first
    elif first not in (roles.names.get("bos"), roles.names.get("cls")):
        roles.names.setdefault("bos", first)
        roles.names.setdefault("cls", first)
    roles.flags["bos"] = first in (roles.names.get("bos"), roles.names.get("cls"))
    if not roles.flags["bos"]:
        warn(f"tokenizer.json begins every text with {first[:40]!r}, which is not the bos token; llama.cpp will not")


def _read_last(roles: _Roles, last: str, has_config: bool) -> None:
    """The template's last token is the eos; the eos named until now ends a turn or a message."""
    if not has_config:
        roles.names["eos"] = last
    elif last != roles.names.get("eos"):
        role = next((role for role in ("eot", "eom") if role not in roles.extra), None)
        if role is not None:
            roles.extra.append(role)
            if "eos" in roles.names:
                roles.names[role] = roles.names["eos"]
        roles.names["eos"] = last
    roles.flags["eos"] = True


def chat_templates(checkpoint: Checkpoint, warn: Warn) -> dict[str, Value]:
    """Chat templates, byte for byte as the checkpoint has them.

    First tokenizer_config.json, then chat_template.jinja with additional_chat_templates/, then chat_template.json.
    """
    template = checkpoint.object("tokenizer_config.json").get("chat_template")
    if template is None and checkpoint.has("chat_template.jinja"):
        template = [{"name": "default", "template": checkpoint.text("chat_template.jinja")}, *_additional(checkpoint)]
    elif template is None:
        template = checkpoint.object("chat_template.json").get("chat_template")
    if isinstance(template, str):
        template = [{"name": "default", "template": template}]
    if template is not None and not isinstance(template, list):
        warn(f"chat_template is {type(template).__name__}, neither text nor list; left out")
    named = {
        re.sub(r"[^A-Za-z0-9]", "_", entry["name"]): entry["template"]
        for entry in objects(template)
        if isinstance(entry.get("name"), str) and entry["name"] and isinstance(entry.get("template"), str)
    }
    default = named.pop("default", "")
    pairs = {f"tokenizer.chat_template.{name}": string(text) for name, text in named.items() if text}
    if named:
        pairs["tokenizer.chat_templates"] = array(GGUFValueType.STRING, list(named))
    if default:
        pairs["tokenizer.chat_template"] = string(default)
    return pairs


def _additional(checkpoint: Checkpoint) -> list[Json]:
    folder = checkpoint.folder / "additional_chat_templates"
    return [
        {"name": path.stem, "template": checkpoint.text(f"{folder.name}/{path.name}")}
        for path in sorted(folder.glob("*.jinja"))
    ]
