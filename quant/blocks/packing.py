"""How the k-quants store small integers: levels of 1, 2 and 4 bits side by side, scales of 6 bits.

Levels are packed as columns, as the searches leave them (element index on axis 0, groups on axis 1), and then put into
the order of the file: fewer bytes have to move, and eight groups are shifted at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Bytes
from gguforge.quant.search.base import byte_scratch

Words = NDArray[np.uint64]
u8 = np.uint8


def as_words(codes: Bytes, mask: int, shift: int = 0) -> Words:
    """Some bits of each code, shape (rows, groups), eight groups to a word: (rows, groups / 8), in working memory."""
    words, out = codes.view("<u8"), byte_scratch("words", codes.shape).view("<u8")
    if shift:
        words = np.right_shift(words, np.uint64(shift), out=out)
    np.bitwise_and(words, np.uint64(mask * 0x0101010101010101), out=out)
    return out


def join(words: Words, bits: int, *apart: int) -> Words:
    """Put each byte together with the one so many bytes farther, that one `bits` higher; then again, twice as much.

    Works in place. No bit may be lost over the edge of its byte.

    >>> hex(int(join(np.array([0x0F0E0D0C0B0A0908], np.uint64), 4, 4)[0]) & 0xFFFFFFFF)
    '0xfbead9c8'
    """
    farther = byte_scratch("farther", (words.nbytes,)).view("<u8").reshape(words.shape)
    for distance in apart:
        np.right_shift(words, np.uint64(8 * distance - bits), out=farther)
        np.bitwise_or(words, farther, out=words)
        bits *= 2
    return words


def lower(words: Words | NDArray[np.uint32] | NDArray[np.uint16], size: int) -> Bytes:
    """The lower `size` bytes of each word: (rows, words) -> (rows, words * size), in working memory."""
    out = byte_scratch("lower", (len(words), words.shape[1] * size))
    np.copyto(out.view(f"<u{size}"), words, casting="unsafe")
    return out


def as_rows(columns: Bytes, n: int) -> Bytes:
    """Columns of bytes as n rows, those of a column together, in working memory."""
    rows = byte_scratch("rows", columns.shape[::-1])
    for i, column in enumerate(columns):  # a third of the time of a transposed copy
        rows[:, i] = column
    return rows.reshape(n, -1)


def as_columns(rows: Bytes, size: int) -> Bytes:
    """Rows of bytes as columns of `size`: the inverse of `as_rows`."""
    return np.ascontiguousarray(rows.reshape(-1, size).T)


def pack_2bit_columns(codes: Bytes, n: int, shift: int = 0) -> Bytes:
    """Two bits from `shift` on of codes in groups of 16, four to a byte as Q2_K, Q3_K, Q6_K store them: (n, 64)."""
    return as_rows(lower(join(as_words(codes, 3, shift), 2, 2, 4), 2), n)


def pack_4bit_columns(codes: Bytes, n: int) -> Bytes:
    """The lower four bits of codes in groups of 32, two to a byte as Q4_K and Q5_K store them: shape (n, 128)."""
    return as_rows(lower(join(as_words(codes, 15), 4, 1).view("<u2"), 1), n)


def pack_2bit(levels: Bytes) -> Bytes:
    """Levels 0..3, shape (n, 256), four to a byte as Q2_K and TQ2_0 store them: shape (n, 64)."""
    return pack_2bit_columns(as_columns(levels, 16), len(levels))


def unpack_2bit(packed: Bytes) -> Bytes:
    """The inverse of `pack_2bit`, shape (n, 256)."""
    q = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (q & u8(3)).reshape(len(packed), -1)


def unpack_4bit(packed: Bytes) -> Bytes:
    """Levels 0..15 of Q4_K and Q5_K, from shape (n, 128): shape (n, 256)."""
    q = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([q & u8(15), q >> u8(4)], axis=2).reshape(len(packed), -1)


def unpack_1bit(packed: Bytes) -> Bytes:
    """The highest bits of Q3_K and Q5_K, from shape (n, 32): shape (n, 256)."""
    return np.unpackbits(packed.reshape(-1, 1, 32), axis=1, bitorder="little").reshape(len(packed), -1)


def pack_6bit(scales: Bytes, minimums: Bytes) -> Bytes:
    """Eight 6-bit scales and minimums, shape (8, n) each, as 12 bytes: shape (n, 12)."""
    out = np.empty((12, scales.shape[1]), np.uint8)
    out[0:4] = scales[:4] | (scales[4:] >> 4) << u8(6)
    out[4:8] = minimums[:4] | (minimums[4:] >> 4) << u8(6)
    out[8:12] = (scales[4:] & 15) | (minimums[4:] & 15) << u8(4)
    return out.T


def unpack_6bit(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse of `pack_6bit`: (n, 12) to scales (n, 8) and minimums (n, 8)."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & u8(63), (c & 15) | (a >> 6) << u8(4)], axis=1)
    minimums = np.concatenate([b & u8(63), (c >> 4) | (b >> 6) << u8(4)], axis=1)
    return scales, minimums


def pack_16_6bit(scales: Bytes) -> Bytes:
    """Sixteen 6-bit scales, shape (16, n), as the 12 bytes of Q3_K: shape (n, 12)."""
    low, high = scales & u8(15), scales >> u8(4)
    out = np.empty((12, scales.shape[1]), np.uint8)
    out[:8] = low[:8] | low[8:] << u8(4)
    out[8:] = high[0:4] | high[4:8] << u8(2) | high[8:12] << u8(4) | high[12:16] << u8(6)
    return out.T


def unpack_16_6bit(packed: Bytes) -> Bytes:
    """The inverse of `pack_16_6bit`: (n, 12) to (n, 16)."""
    low = np.concatenate([packed[:, :8] & u8(15), packed[:, :8] >> u8(4)], axis=1)
    high = np.concatenate([packed[:, 8:] >> u8(shift) & u8(3) for shift in (0, 2, 4, 6)], axis=1)
    scales: Bytes = low | high << u8(4)
    return scales
