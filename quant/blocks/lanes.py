"""Blocks of 32 weights as lanes: row i holds weights 4i..4i+3 of every block, so a block is four columns of eight.

For what needs no order of summing: extremes and elementwise work. Four weights move at once, which takes a third of
the time of moving every weight into a row of its own, and a block's bytes come out in fours as well.

A weight is a word here, as it is stored: sign and magnitude of an F32, F16 or BF16, whose magnitudes are ordered as
integers are. Extremes are found in words, half as many bytes as in numbers where a word has 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats
from gguforge.quant.search.base import scratch

LANES, ROWS = 4, 8
TRANSPOSED = 256  # blocks at once: what stays in the cache while it is read eight times
u4 = np.dtype("<u4")

Words = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Width:
    """Constants for words of a width.

    Attributes:
        signed: the same as integers with a sign.
        four: what has the size of four words.
        sign, magnitude: the bits of a word that hold them.
    """

    signed: DTypeLike
    four: DTypeLike
    sign: Any
    magnitude: Any


WIDTHS = {
    2: Width(np.int16, np.uint64, np.uint16(0x8000), np.uint16(0x7FFF)),
    4: Width(np.int32, np.complex128, np.uint32(0x80000000), np.uint32(0x7FFFFFFF)),
}
"""By the bytes of a word."""


def working_words(purpose: str, shape: tuple[int, int], like: Words) -> Words:
    """Working memory for words."""
    rows, columns = shape
    return scratch(purpose, (rows, columns * like.itemsize // 4)).view(like.dtype)


def as_lanes(words: Words) -> Words:
    """Blocks, shape (n, 32), as lanes, shape (8, 4 * n), in working memory."""
    lanes = working_words("lanes", (ROWS, LANES * len(words)), words)
    four = WIDTHS[words.itemsize].four
    rows, columns = lanes.view(four), words.view(four).T
    for start in range(0, len(words), TRANSPOSED):
        rows[:, start : start + TRANSPOSED] = columns[:, start : start + TRANSPOSED]
    return lanes


def magnitudes(words: Words, out: Words | None = None) -> Words:
    """Words without their signs."""
    found: Words = np.bitwise_and(words, WIDTHS[words.itemsize].magnitude, out=out)
    return found


def codes_as_lanes(codes: Bytes) -> Bytes:
    """The same of bytes: (n, 32) to (8, 4 * n)."""
    return np.ascontiguousarray(np.ascontiguousarray(codes).view(u4).T).view(np.uint8)


def put_lanes(codes: NDArray[np.uint8] | NDArray[np.int8], field: Blocks) -> None:
    """Store rows of four bytes a block, shape (rows, 4 * n), as the bytes of a field, shape (n, 4 * rows)."""
    words = field.view(u4)
    for i, row in enumerate(codes.view(u4)):  # half the time of a transposed copy
        words[:, i] = row


def largest(lanes: Words) -> Words:
    """The largest word of each block, as an integer; shape (n,)."""
    found: Words = _of_four(np.maximum.reduce(lanes, axis=0))
    return found


def extremes(lanes: Words) -> Words:
    """The words of the largest and the smallest weight of each block, shape (2, n).

    Where all weights have one sign, both are that of the largest magnitude. Of +0 and -0 it is either.
    """
    width = WIDTHS[lanes.itemsize]
    both = working_words("extremes", (2, lanes.shape[1]), lanes)
    signed = both.view(width.signed)
    np.maximum.reduce(lanes.view(width.signed), axis=0, out=signed[0])
    np.maximum.reduce(lanes, axis=0, out=both[1])  # as unsigned integers negative numbers are the largest
    both[1] ^= width.sign
    found: Words = _of_four(signed).view(lanes.dtype)
    found[1] ^= width.sign
    return found


def _of_four(found: NDArray[Any]) -> Any:
    """The largest of each four along the last axis."""
    a, b, c, d = (found[..., i::LANES] for i in range(LANES))
    return np.maximum(np.maximum(a, b), np.maximum(c, d))


def per_lane(values: Floats) -> Floats:
    """A number of each block, shape (n,), for each of its lanes, shape (4 * n,), in working memory."""
    columns = scratch("per lane", (len(values), LANES))
    for i in range(LANES):
        columns[:, i] = values
    return columns.reshape(-1)


def as_codes(lanes: Floats, type: DTypeLike = np.uint8) -> NDArray[Any]:
    """Lanes truncated to bytes (`type`: signed or not), same shape, in working memory."""
    codes = scratch("codes", (lanes.size // 4,)).view(type).reshape(lanes.shape)
    np.copyto(codes, lanes, casting="unsafe")
    return codes


def signs(lanes: Words) -> NDArray[np.int8]:
    """-1 for words of numbers below zero, else 0; in working memory."""
    below = scratch("signs", (lanes.size // 4,)).view(np.bool_).reshape(lanes.shape)
    np.greater_equal(lanes, WIDTHS[lanes.itemsize].sign, out=below)
    found: NDArray[np.int8] = np.negative(below.view(np.int8), out=below.view(np.int8))
    return found


def with_signs(codes: NDArray[np.int8], negative: NDArray[np.int8]) -> NDArray[np.int8]:
    """Codes of magnitudes with their signs; in place."""
    codes ^= negative
    codes -= negative
    return codes


def halves(codes: Bytes) -> Bytes:
    """Codes 0..15, shape (8, 4 * n), two to a byte: the first half of a block in the low nibbles; shape (4, 4 * n).

    It uses the codes up.
    """
    words = codes.view(u4)
    high = words[ROWS // 2 :]
    high <<= np.uint32(4)
    return np.bitwise_or(words[: ROWS // 2], high, out=high).view(np.uint8)


def fifth_bits(codes: Bytes) -> NDArray[np.uint32]:
    """Bit 4 of weight j as bit j of one word a block: (8, 4 * n) -> (n,)."""
    words = codes.view(u4)
    bits = np.bitwise_and(words, np.uint32(0x10101010), out=scratch("fifth bits", words.shape).view(u4))
    bits *= np.uint32(0x01020408)  # the product gathers the bits of four bytes in the highest four
    bits >>= np.uint32(28)
    bits <<= np.arange(0, 4 * ROWS, 4, dtype=np.uint32)[:, None]
    found: NDArray[np.uint32] = np.bitwise_or.reduce(bits, axis=0)
    return found
