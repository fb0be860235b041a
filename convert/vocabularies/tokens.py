"""What every vocabulary is made of: tokens with their text, kind and score."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from gguforge.quant.constants import GGUFValueType
from gguforge.quant.metadata import Value, array, string

ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0
META_SPACE = "\u2581"
"""The lower block that sentencepiece writes for a space."""


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of a vocabulary; scores are written for sentencepiece-like vocabularies only."""

    text: str
    kind: Kind
    score: float = 0.0


def padding(i: int) -> Token:
    """The filler for an id that has an embedding row and no token."""
    return Token(f"[PAD{i}]", Kind.UNUSED, PADDING_SCORE)


def added(text: str, special: bool) -> Token:
    """A token that was added to a trained vocabulary.

    Some checkpoints do not mark as special what clearly is: command-r, deepseek-coder and gemma are known cases.
    """
    if special or looks_special(text):
        return Token(text, Kind.CONTROL, ADDED_SCORE)
    return Token(text.replace(META_SPACE, " "), Kind.USER_DEFINED, ADDED_SCORE)


def looks_special(text: str) -> bool:
    """Whether an added token is a control token by its spelling.

    >>> [looks_special(text) for text in ("<|im_end|>", "<pad>", "<unused7>", "<tool_call>")]
    [True, True, True, False]
    """
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(left) and text.endswith(right) for left, right in brackets
    )


def token_metadata(model: str, pre: str, tokens: Sequence[Token], scored: bool) -> dict[str, Value]:
    """The vocabulary itself, in file order."""
    pairs = {
        "model": string(model),
        "pre": string(pre),
        "tokens": array(GGUFValueType.STRING, [token.text for token in tokens]),
    }
    if scored:
        pairs["scores"] = array(GGUFValueType.FLOAT32, [single(token.score) for token in tokens])
    pairs["token_type"] = array(GGUFValueType.INT32, [int(token.kind) for token in tokens])
    return {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}


def single(number: float) -> float:
    """A number as float32 holds it, so that a plan equals the file made from it."""
    value: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return value
