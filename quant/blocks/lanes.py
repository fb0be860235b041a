"""Blocks of 32 weights as lanes: row i holds weights 4i..4i+3 of every block, so a block is four columns of eight.

For what needs no order of summing: extremes and elementwise work. Sixteen bytes move at once, which takes a third of
the time of moving every weight into a row of its own, and a block's bytes come out in fours as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gguforge.quant.blocks.base import Blocks, Bytes, Floats
from gguforge.quant.search.base import scratch

LANES, ROWS = 4, 8
u4 = np.dtype("<u4")


def as_lanes(x: Floats) -> Floats:
    """Blocks, shape (n, 32), as lanes, shape (8, 4 * n), in working memory."""
    lanes = scratch("lanes", (ROWS, LANES * len(x)))
    lanes.view(np.complex128)[...] = x.view(np.complex128).T
    return lanes


def codes_as_lanes(codes: Bytes) -> Bytes:
    """The same of bytes: (n, 32) to (8, 4 * n)."""
    return np.ascontiguousarray(np.ascontiguousarray(codes).view(u4).T).view(np.uint8)


def put_lanes(codes: NDArray[np.uint8] | NDArray[np.int8], field: Blocks) -> None:
    """Store rows of four bytes a block, shape (rows, 4 * n), as the bytes of a field, shape (n, 4 * rows)."""
    words = field.view(u4)
    for i, row in enumerate(codes.view(u4)):  # half the time of a transposed copy
        words[:, i] = row


def extremes(lanes: Floats) -> tuple[Floats, Floats]:
    """The largest and the smallest weight of each block, shape (n,) each; of +0 and -0 either."""
    both = scratch("extremes", (2, lanes.shape[1]))
    np.maximum.reduce(lanes, axis=0, out=both[0])
    np.negative(np.minimum.reduce(lanes, axis=0, out=both[1]), out=both[1])
    a, b, c, d = both.reshape(2, -1, LANES).transpose(2, 0, 1)
    top, opposite = np.maximum(np.maximum(a, b), np.maximum(c, d))
    return top, -opposite


def per_lane(values: Floats) -> Floats:
    """A number of each block, shape (n,), for each of its lanes, shape (4 * n,)."""
    return values.repeat(LANES)


def as_codes(lanes: Floats, type: DTypeLike = np.uint8) -> NDArray[Any]:
    """Lanes truncated to bytes (`type`: signed or not), same shape, in working memory."""
    codes = scratch("codes", (lanes.size // 4,)).view(type).reshape(lanes.shape)
    np.copyto(codes, lanes, casting="unsafe")
    return codes


def halves(codes: Bytes) -> Bytes:
    """Codes 0..15, shape (8, 4 * n), two to a byte: the first half of a block in the low nibbles; shape (4, 4 * n)."""
    words = codes.view(u4)
    return (words[:4] | words[4:] << np.uint32(4)).view(np.uint8)


def fifth_bits(codes: Bytes) -> NDArray[np.uint32]:
    """Bit 4 of weight j as bit j of one word a block: (8, 4 * n) -> (n,)."""
    bits = codes.view(u4) >> np.uint32(4) & np.uint32(0x01010101)
    fours = bits * np.uint32(0x01020408) >> np.uint32(24)  # the product gathers the low bits of four bytes in the last
    fours <<= np.arange(0, 4 * ROWS, 4, dtype=np.uint32)[:, None]
    words: NDArray[np.uint32] = np.bitwise_or.reduce(fours, axis=0)
    return words
