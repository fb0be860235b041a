"""What the IQ2 and IQ3 types share: signs, scales of four bits, the search for grid points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import Bytes, Floats
from gguforge.quant.blocks.kquants import per_block
from gguforge.quant.search.base import as_groups, f32, nearest_int, scratch
from gguforge.quant.search.grids import grid
from gguforge.quant.search.lattice import Again, GridFit, magnitudes
from gguforge.quant.search.positive import PositiveFit

Codes = NDArray[np.uint32]
Item = TypeVar("Item", bound=np.generic)


@dataclass(frozen=True)
class Kind:
    """How one type searches.

    Attributes:
        grid: name of its grid.
        size: weights in a group.
        steps: candidates put the largest weight at the top of the lattice plus step * width.
        width: see `steps`.
        smallest: a group whose largest weight is below this is all zero.
        even: whether the signs of eight weights have even parity.
        again: which points are rounded a last time.
        first: whether the candidates start from a fit without a grid (levels 0..4), not from the largest weight.
    """

    grid: str
    size: int
    steps: range
    width: float
    smallest: float
    even: bool
    again: Again
    first: bool = False


@dataclass(frozen=True)
class Found:
    """Encoded super-blocks.

    Attributes:
        index: grid points in the order of the weights, shape (n, points).
        signs: of each eight weights, shape (n, 32).
        scale: scale / d = 2 * code + 1, codes 0..15, shape (n, groups).
        d: step of the scales, shape (n,).
        empty: whether all scales are zero, shape (n,).
    """

    index: NDArray[np.int16]
    signs: Bytes
    scale: Bytes
    d: Floats
    empty: NDArray[np.bool_]


def search(x: Floats, w: Floats, kind: Kind) -> Found:
    """Encode super-blocks `x`, shape (n, 256), weighted by `w`, same shape."""
    n, points = len(x), grid(kind.grid)
    groups, weights = as_groups(x, kind.size), as_groups(w, kind.size, "weights")
    size, signs = magnitudes(groups, weights if kind.even else None)
    top = size.max(axis=0)
    zero = top < f32(kind.smallest)
    highest = 2 * points.top + 1
    scale = top / f32(highest)
    if kind.first:
        scale = PositiveFit(size, weights, points.top + 2).scale
        top = scale * f32(points.top + 1)
        zero |= top <= 0
    top[zero] = 1
    candidates = f32(highest) + np.array(kind.steps, np.float32) * f32(kind.width)
    fit = GridFit(size, weights, points, candidates, top, kind.again, scale)
    negative = fit.scale < 0
    signs[:, negative] ^= np.uint8(127 if kind.even else 255)
    for array in (fit.scale, fit.index, signs):
        array[..., zero] = 0
    scales = per_block(np.abs(fit.scale), 256 // kind.size)
    codes, d = round_odd(scales)
    return Found(in_blocks(fit.index, n), in_blocks(signs, n), codes.T, d, scales.max(axis=0) == 0)


def in_blocks(rows: NDArray[Item], n: int) -> NDArray[Item]:
    """Items of groups, shape (items, groups), as those of n blocks: (n, items)."""
    return np.ascontiguousarray(rows.T).reshape(n, -1)


def round_odd(scales: Floats) -> tuple[Bytes, Floats]:
    """Scales (groups, n), not negative, as odd multiples 2 * code + 1 of a step, and the step; the largest gets 31."""
    d = scales.max(axis=0) / f32(31)
    codes = nearest_int(f32(0.5) * (f32(1) / d * scales - f32(1)))  # where all are zero: that of no number, 0
    return codes.clip(0, 15).astype(np.uint8), d


def squares(x: Floats) -> Floats:
    """The importance of weights about which nothing is known."""
    return np.square(x, out=scratch("importance", x.shape))


def with_parity(signs: NDArray[np.uint16] | Codes) -> Bytes:
    """Seven signs as eight with even parity."""
    s: Bytes = (signs & 127).astype(np.uint8)
    parity = s ^ s >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    s |= (parity & 1) << np.uint8(7)
    return s


def signed(points: Floats, signs: Bytes) -> Floats:
    """Grid points with signs: shapes (n, groups, weights) and (n, 32) -> (n, groups, weights)."""
    bits = np.unpackbits(np.ascontiguousarray(signs), axis=1, bitorder="little").reshape(points.shape)
    return np.where(bits > 0, -points, points)


def nibbles(scales: Bytes) -> Bytes:
    """Two codes 0..15 of each byte, the lower first: (n, m) -> (n, 2 m)."""
    return np.stack([scales & np.uint8(15), scales >> np.uint8(4)], axis=2).reshape(len(scales), -1)


def pack_pairs(codes: Bytes) -> Bytes:
    """The inverse of `nibbles`."""
    return codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)


def seven_and_four(signs: Bytes, scale: Bytes) -> Codes:
    """Four times seven signs, shape (n, 32), and a scale, shape (n, 8), as one word of 32 bits: (n, 8)."""
    s = signs.reshape(-1, 8, 4).astype(np.uint32) << np.array([0, 7, 14, 21], np.uint32)
    words: Codes = np.bitwise_or.reduce(s, axis=2) | scale.astype(np.uint32) << np.uint32(28)
    return words


def seven_of(words: Codes) -> Bytes:
    """The signs of `seven_and_four`, with parity: (n, 8) -> (n, 32)."""
    return with_parity(words[..., None] >> np.array([0, 7, 14, 21], np.uint32)).reshape(len(words), -1)
