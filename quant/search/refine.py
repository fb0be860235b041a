"""A better search inside a k-quant: what llama.cpp's search found, improved move by move until nothing helps.

Three moves take turns, each kept for a super-block only if the weighted squared error falls: the scale and the minimum
of a group go one step up or down; `d` and `dmin` become the least-squares solution for the levels as they are, rounded
to fp16; levels are rounded again against the scales that will really be read back. Unlike the rest of this package it
equals no C function, and its bits may differ between machines.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks.base import REGISTRY, Bytes, Floats
from gguforge.quant.blocks.fields import RANGES, Fields, Range, pack, unpack
from gguforge.quant.constants import GGMLQuantizationType
from gguforge.quant.search.base import f32

TILE = 1024  # super-blocks worked on at a time
ROUNDS = 4
ENOUGH = 1e-4  # a round that gains less, relative to the error, is the last

Groups = NDArray[np.float32]  # shape (groups, group size, n)


def refined(rows: Floats, type: GGMLQuantizationType, weights: Floats | None = None) -> Bytes:
    """Quantize rows as `Block.encode` does, with a better search where the type is a k-quant.

    Args:
        rows: shape (n, row length), float32, finite.
        type: the block type.
        weights: importance of each column, shape (row length,); None if all columns matter alike.

    Returns:
        shape (n, bytes per row).
    """
    kind = REGISTRY[type]
    first = kind.encode(rows, weights)
    if type not in RANGES:
        return first
    blocks, x = first.reshape(-1).view(kind.layout), rows.reshape(-1, kind.size)
    columns = np.ones((1, kind.size), np.float32) if weights is None else weights.reshape(-1, kind.size)
    for start in range(0, len(blocks), TILE):
        part = slice(start, min(start + TILE, len(blocks)))
        w = columns[np.arange(part.start, part.stop) % len(columns)].T
        here = np.ascontiguousarray(x[part].T)
        blocks[part] = pack(refine(here, importance(here, w, weights is not None), unpack(blocks[part], type)))
    return first


def importance(x: Floats, columns: Floats, known: bool) -> Floats:
    """What an error of each weight costs: the column's importance, more for large weights if that was measured.

    The square root is llama.cpp's; without it the error falls further and the divergence rises.
    """
    if not known:
        return columns
    more: Floats = columns * np.sqrt(np.mean(x * x, axis=0) * f32(2) + x * x)
    return more


def refine(x: Floats, w: Floats, start: Fields) -> Fields:
    """Lower the weighted squared error of super-blocks.

    Args:
        x: weights, shape (256, n).
        w: their importance, same shape (or one that broadcasts to it).
        start: an encoding of `x`; its arrays are changed.

    Returns:
        `start`, nowhere worse than it was.
    """
    range = start.range
    shape = range.groups, range.size, x.shape[1]
    values, weights = x.reshape(shape), np.broadcast_to(w, x.shape).reshape(shape)
    error = _error(values, weights, start.step, start.offset, start.level.reshape(shape))
    for _ in itertools.repeat(None, ROUNDS):
        before = float(error.sum())
        error = _move_scales(values, weights, start, error)
        error = _refit(values, weights, start, error)
        if before - float(error.sum()) <= ENOUGH * before:
            break
    return start


def round_to(x: Groups, step: Floats, offset: Floats, range: Range) -> Groups:
    """Levels nearest to weights, for steps and offsets of groups, shape (groups, n); level 0 where the step is 0."""
    inverse = np.divide(f32(1), step, out=np.zeros_like(step), where=step != 0)
    level: Groups = np.rint((x + offset[:, None]) * inverse[:, None])
    level.clip(*range.level, out=level)
    return level


def fp16(values: NDArray[np.floating]) -> Floats:
    """Rounded to half precision, as float32."""
    return values.astype(np.float16).astype(np.float32)


def solve_pair(
    aa: Floats, ab: Floats, bb: Floats, ax: Floats, bx: Floats
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Where [[aa, ab], [ab, bb]] (p, q) = (ax, bx) has one clear solution, and the solutions."""
    a, b, c = (part.astype(np.float64) for part in (aa, ab, bb))
    determinant = a * c - b * b
    clear = determinant > 1e-9 * a * c
    safe = np.where(clear, determinant, 1)
    return clear, (ax * c - bx * b) / safe, (bx * a - ax * b) / safe


def _error(x: Groups, w: Groups, step: Floats, offset: Floats, level: Groups) -> Floats:
    """Weighted squared error of each group, shape (groups, n)."""
    t = step[:, None] * level
    t -= x
    t -= offset[:, None]
    np.square(t, out=t)
    t *= w
    total: Floats = t.sum(axis=1)
    return total


def _move_scales(x: Groups, w: Groups, f: Fields, error: Floats) -> Floats:
    """Scales and minimums one step up or down, group by group; returns the new errors."""
    range, level = f.range, f.level.reshape(x.shape)
    scale, minimum = f.scale.copy(), f.minimum.copy()
    for ds, dm in itertools.product((-1, 0, 1), (-1, 0, 1) if range.minimum else (0,)):
        s = np.clip(scale + f32(ds), *range.scale)
        m = np.clip(minimum + f32(dm), 0, range.minimum)
        step, offset = f.d * s, f.dmin * m
        rounded = round_to(x, step, offset, range)
        this = _error(x, w, step, offset, rounded)
        won = this < error
        error = np.where(won, this, error)
        np.copyto(f.scale, s, where=won)
        np.copyto(f.minimum, m, where=won)
        np.copyto(level, rounded, where=won[:, None])
    f.level = level.reshape(f.level.shape)
    return error


def _refit(x: Groups, w: Groups, f: Fields, error: Floats) -> Floats:
    """`d` and `dmin` by least squares, levels rounded again; kept by super-block. Returns the new errors."""
    a = f.scale[:, None] * f.level.reshape(x.shape)
    wa = w * a
    aa, ax = (wa * a).sum(axis=(0, 1)), (wa * x).sum(axis=(0, 1))
    alone = np.divide(ax, aa, out=f.d.astype(np.float32), where=aa > 0)
    d, dmin = alone, np.zeros_like(alone)
    if f.range.minimum:
        b = -np.broadcast_to(f.minimum[:, None], x.shape)
        wb = w * b
        ab, bb, bx = (wb * a).sum(axis=(0, 1)), (wb * b).sum(axis=(0, 1)), (wb * x).sum(axis=(0, 1))
        clear, p, q = solve_pair(aa, ab, bb, ax, bx)
        both = clear & (q >= 0)
        d, dmin = np.where(both, p, alone), np.where(both, q, 0)
    new = Fields(f.type, fp16(d), fp16(dmin), f.scale.copy(), f.minimum.copy(), f.level)
    rounded = round_to(x, new.step, new.offset, f.range)
    this = _error(x, w, new.step, new.offset, rounded)
    new.level = rounded.reshape(f.level.shape)
    won = np.isfinite(new.d) & np.isfinite(new.dmin) & (this.sum(axis=0) < error.sum(axis=0))
    f.take(won, new)
    return np.where(won, this, error)
