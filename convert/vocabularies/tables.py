"""What tokenizers in JSON and text files share: a table of ids by text, and tokens that were added to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gguforge.convert.checkpoint import Checkpoint
from gguforge.convert.json_file import Json, objects
from gguforge.convert.vocabularies.sentencepiece import added_tokens
from gguforge.convert.vocabularies.special import content
from gguforge.convert.vocabularies.tokens import Kind, Token, padding
from gguforge.quant.errors import CheckpointError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token beside a tokenizer's own vocabulary, or one of them with a flag."""

    text: str
    special: bool
    normalized: bool


def checked_model(tokenizer: Json, kind: str, path: Path, default: str | None = None) -> Json:
    """The model in a tokenizer.json.

    Args:
        kind: the type that it must have.
        default: the type of models that name none.

    Raises:
        CheckpointError: it is missing, or another one.
    """
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", default) != kind:
        found = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError("the tokenizer's model cannot be converted", path=path, expected=kind, found=found)
    return model


def checked_vocabulary(vocabulary: object, path: Path) -> dict[str, int]:
    """A table of ids by text.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(vocabulary, dict) or not all(map(_is_id, vocabulary.values())):
        raise CheckpointError("vocab is no table of ids", path=path)
    return vocabulary


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def added_tokens_of(
    tokenizer: Json, vocabulary: dict[str, int], checkpoint: Checkpoint, names: Mapping[str, str] = MappingProxyType({})
) -> dict[int, AddedToken]:
    """Added tokens by id: tokenizer.json's, changed and extended by tokenizer_config.json's, as transformers does.

    Args:
        names: the special tokens that the tokenizer's class has where tokenizer_config.json names none.
    """
    tokens: dict[int, AddedToken] = {}
    for entry in objects(tokenizer.get("added_tokens")):
        if isinstance(entry.get("content"), str) and _is_id(entry.get("id")):
            special = entry.get("special") is True
            tokens[entry["id"]] = AddedToken(entry["content"], special, entry.get("normalized", not special) is True)
    config = checkpoint.object("tokenizer_config.json")
    if (
        "added_tokens_decoder" not in config
    ):  # an old checkpoint: its special tokens may be named in a file of their own
        config = checkpoint.object("special_tokens_map.json") | {key: entry for key, entry in config.items() if entry}
    ids = {token.text: i for i, token in tokens.items()}

    def add(text: str, special: bool) -> None:
        i = ids.get(text, vocabulary.get(text))
        if i is None:
            i = max([*vocabulary.values(), *tokens], default=-1) + 1
        ids[text] = i
        tokens[i] = AddedToken(text, special, tokens[i].normalized if i in tokens else False)

    listed = config.get("additional_special_tokens")
    named = [content(config.get(name, names.get(name))) for name in SPECIAL_NAMES]
    named += [content(entry) for entry in listed] if isinstance(listed, list) else []
    own = [(i, token.text, token.special) for i, token in tokens.items()]
    for _, text, special in sorted(added_tokens(config) if "added_tokens_decoder" in config else own):
        add(text, special or text in named)
    for name in named:
        if name is not None and name not in ids:
            add(name, special=True)
    return tokens


def added_tokens_file(checkpoint: Checkpoint) -> Json:
    """added_tokens.json of an older checkpoint, in the form that tokenizer.json has for it."""
    listed = checkpoint.object("added_tokens.json").items()
    return {"added_tokens": [{"id": i, "content": text, "special": False, "normalized": False} for text, i in listed]}


def base_tokens(
    vocabulary: Mapping[str, int], added: Mapping[int, AddedToken], vocab_size: int, path: Path
) -> list[Token]:
    """The table as normal tokens, padded to `vocab_size`; the added ones are left to the caller.

    Raises:
        CheckpointError: an id is beyond `vocab_size`.
    """
    most = max([*vocabulary.values(), *added], default=-1)
    if most >= vocab_size:
        sides = {"expected": f"ids below {vocab_size} (vocab_size of config.json)", "found": f"id {most}"}
        raise CheckpointError("the tokenizer has more tokens than the model", path=path, **sides)
    tokens = [padding(i) for i in range(vocab_size)]
    for text, i in vocabulary.items():
        tokens[i] = Token(text, Kind.NORMAL)
    return tokens
