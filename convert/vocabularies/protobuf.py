"""As much of the protobuf wire format as a sentencepiece model's normalizer takes to read.

The format: https://protobuf.dev/programming-guides/encoding. The fields: sentencepiece_model.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
TRAINER, NORMALIZER = 2, 3  # fields of ModelProto
MODEL_TYPE = 3  # of TrainerSpec
UNIGRAM = 1
CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # of NormalizerSpec


@dataclass(frozen=True)
class Normalizer:
    """What a sentencepiece model does to a text before cutting it.

    Attributes:
        charsmap: its compiled table of replacements, possibly empty.
        add_prefix: put a space before the text.
        remove_spaces: take out leading, trailing and repeated spaces.
        unigram: whether the model is one; it is here because it stands in the same file.
    """

    charsmap: bytes
    add_prefix: bool
    remove_spaces: bool
    unigram: bool


def read_normalizer(data: bytes) -> Normalizer:
    """Read it from a serialized ModelProto; absent fields have sentencepiece's defaults.

    Raises:
        ValueError: the data is no protobuf message, or a field has another kind than it should.
    """
    whole = dict(fields(data))
    trainer, normalizer = (dict(fields(_bytes(whole.get(number, b"")))) for number in (TRAINER, NORMALIZER))
    return Normalizer(
        charsmap=_bytes(normalizer.get(CHARSMAP, b"")),
        add_prefix=bool(normalizer.get(ADD_DUMMY_PREFIX, 1)),
        remove_spaces=bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, 1)),
        unigram=trainer.get(MODEL_TYPE, UNIGRAM) == UNIGRAM,
    )


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes should be")
    return value


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    r"""Number and value of every field of a message.

    >>> list(fields(b"\x08\x96\x01\x12\x02hi"))
    [(1, 150), (2, b'hi')]
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is cut short")
