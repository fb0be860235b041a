"""Finds the blocks that weights were decoded from, so that they are stored again without loss.

Quantization-aware training and dequantized files leave weights that are whole multiples of steps. A search for the
least error is not bound to come back to those steps; here they are solved for. A weight is d * scale * level -
dmin * minimum, with one scale and minimum a group, `d` and `dmin` in half precision:

1. Each group's step, as far as its weights tell it (`gguforge.quant.search.steps`).
2. `d`: a half-precision number of which every group's step is a whole multiple that the type has as a scale. The widest
   step is tried as every multiple in turn; rounding leaves it an interval with few half-precision numbers in it.
3. `dmin` likewise, from the distances of the groups' levels to zero.

Nothing is believed: the blocks are decoded, rounded to the type that the weights were stored in, and compared. Types
without such steps are left to their own encoder, whose blocks are proved the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.blocks import block_type, decode, encode
from gguforge.quant.blocks.base import Bytes, Floats
from gguforge.quant.blocks.fields import RANGES, Fields, pack
from gguforge.quant.blocks.grouped import GroupedBlock
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.search.offsets import Offsets
from gguforge.quant.search.steps import Doubles, Levels, halves_between, interval, steps_of

TRIES = 3000  # of steps and offsets for blocks looked at together; 1,000 super-blocks in BF16 take up to 800

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """What a type can hold.

    Attributes:
        size: weights of a group.
        groups: groups of a block.
        levels: lowest and highest.
        scales: lowest and highest multiple of `d` that a group's step can be; 1 and 1 without scales.
        minimums: the same for the offset; 0 and 0 without.
        signed: whether `d` and the offset may be negative.
    """

    size: int
    groups: int
    levels: tuple[int, int]
    scales: tuple[int, int]
    minimums: tuple[int, int]
    signed: bool

    @property
    def widest(self) -> int:
        """Steps from where levels begin to the farthest level."""
        return self.levels[1] - self.levels[0] if self.minimums[1] else max(-self.levels[0], self.levels[1])

    @property
    def orders(self) -> Iterator[tuple[int, ...]]:
        """What to try as the steps to the farthest weight, until a block is found.

        Encoders mostly use all levels; the coarsest step is the safest where there are scales; without, each in turn.
        """
        tops = tuple(range(1, self.widest + 1))
        yield tops[::-1]
        yield tops
        if self.groups == 1:
            yield from ((top,) for top in tops)


def grid_of(type: T) -> Grid | None:
    """The grid of a type, None where its levels are not evenly spaced."""
    if type in RANGES:
        size, levels, scales, minimum = RANGES[type]
        return Grid(size, RANGES[type].groups, levels, scales, (0, minimum), signed=not minimum)
    kind = block_type(type)
    if not issubclass(kind, GroupedBlock):
        return None
    minimums = (1, 1) if kind.offset else (0, 0)
    return Grid(kind.size, 1, (kind.low, kind.high), (1, 1), minimums, signed=True)


def recover(x: Floats, type: T, stored: T) -> tuple[Bytes, Mask]:
    """Blocks that give weights back.

    Args:
        x: blocks of weights, shape (n, block size), finite.
        type: the block type.
        stored: F32, F16 or BF16: what the weights were rounded to.

    Returns:
        The blocks, shape (n, bytes of a block), and which of them do, shape (n,); the others are nothing.
    """
    grid = grid_of(type)
    if grid is None:
        data = encode(x, type)
        return data, gives_back(data, type, x, stored)
    out, done = np.zeros((len(x), block_type(type).layout.itemsize), np.uint8), np.zeros(len(x), np.bool_)
    rest, tries = np.arange(len(x)), TRIES
    with np.errstate(all="ignore"):
        for tops in grid.orders:
            solver = _Solver(x[rest], type, stored, grid, tops)
            out[rest], done[rest] = solver.solve(tries)
            rest, tries = rest[solver.open & ~solver.done], solver.left
            if not len(rest) or tries <= 0:
                break
    return out, done


def gives_back(data: Bytes, type: T, x: Floats, stored: T) -> Mask:
    """Which blocks, shape (n, bytes), decode to exactly these weights, shape (n, block size), once these are rounded to
    their stored type."""
    values = decode(data, type)
    same: Mask = (decode(encode(values, stored), stored) == x).all(axis=1)
    return same


class _Solver:
    """n blocks, looked at together. Arrays of groups have the shape (groups, n).

    Attributes:
        open: blocks all of whose groups have a step, shape (n,).
        done: blocks that were found, shape (n,).
        left: tries that are left.
    """

    def __init__(self, x: Floats, type: T, stored: T, grid: Grid, tops: tuple[int, ...]) -> None:
        self.x, self.type, self.stored, self.grid = x, type, stored, grid
        self.out = np.zeros((len(x), block_type(type).layout.itemsize), np.uint8)
        self.done, self.left = np.zeros(len(x), np.bool_), 0
        columns = x.reshape(-1, grid.size).T
        low, high = interval(columns, stored)
        steps = steps_of(columns.astype(np.float64), low, high, tops, grid.minimums[1] > 0)
        shape = len(x), grid.groups
        self.low, self.high, self.top, found = (
            a.reshape(shape).T for a in (steps.low, steps.high, steps.top, steps.found)
        )
        blocks = grid.size, *shape
        self.level: Levels = steps.level.reshape(blocks).transpose(0, 2, 1)
        self.bounds = [bound.reshape(blocks).transpose(0, 2, 1) for bound in (low, high)]
        self.values = columns.reshape(blocks).transpose(0, 2, 1)
        self.open = found.all(axis=0)

    def solve(self, tries: int) -> tuple[Bytes, Mask]:
        """The blocks, and which were found with so many tries."""
        self.left = tries
        for which, d in self._steps():
            if self.left <= 0:
                break
            for sign in (1, -1) if self.grid.signed and not self.grid.minimums[1] else (1,):
                here = ~self.done[which]
                self._try(which[here], sign * d[here])
        return self.out, self.done

    def _steps(self) -> Iterator[tuple[NDArray[np.int64], Doubles]]:
        """Blocks, and a `d` that each may have."""
        flat = np.flatnonzero(self.open & ~(self.top > 0).any(axis=0))
        yield flat, np.zeros(len(flat))
        most = max(abs(scale) for scale in self.grid.scales)
        widest = self.grid.widest
        clear = np.where(self.top > 0, widest // np.maximum(self.top, 1), 0)  # how often the step may be divided
        score = np.where(self.top > 0, self.low, -1) / np.where(clear > 1, 1e9, 1)
        chosen = score.argmax(axis=0)[None]
        low, high, parts = (np.take_along_axis(a, chosen, 0)[0] for a in (self.low, self.high, clear))
        for multiple in [*range(most, 0, -1), *range(most + 1, most * int(parts.max(initial=0)) + 1)]:
            which = np.flatnonzero(self.open & ~self.done & (multiple <= most * parts))
            if not len(which):
                continue
            for more, d in halves_between(low[which] / multiple, high[which] / multiple):
                yield which[more], d

    def _try(self, which: NDArray[np.int64], d: Doubles) -> None:
        """See whether blocks have the step `d`, shape (blocks,)."""
        self.left -= 1
        scale, factor, fits = self._scales(which, d)
        which, d, scale, factor = which[fits], d[fits], scale[:, fits], factor[:, fits]
        if not len(which):
            return
        if not self.grid.minimums[1]:
            step = d * scale
            level = np.rint(self.values[:, :, which] / np.where(step == 0, np.inf, step)).astype(np.int64)
            level = level.clip(*self.grid.levels)
            self._keep(which, d, np.zeros(len(d)), scale, np.zeros_like(scale), level)
            return
        level = self.level[:, :, which] * factor
        low, high = (bound[:, :, which] for bound in self.bounds)
        offsets = Offsets(d * scale, level, low, high, self.grid.levels[1], self.grid.minimums[1])
        for some, dmin, minimum, shift in offsets.solutions(self.left):
            self._keep(which[some], d[some], dmin, scale[:, some], minimum, level[:, :, some] + shift)
            offsets.open[some] = ~self.done[which[some]]
        self.left -= offsets.tries

    def _scales(self, which: NDArray[np.int64], d: Doubles) -> tuple[Levels, Levels, Mask]:
        """Each group's scale, what its levels are multiplied with, and where all groups have one."""
        low, high, top = self.low[:, which], self.high[:, which], self.top[:, which]
        size = np.where(d == 0, 1, np.abs(d))
        middle = np.where(np.isinf(high), 0, (low + np.where(np.isinf(high), 0, high)) / 2)
        whole = np.rint(middle / size).astype(np.int64)
        open = (whole * size >= low) & (whole * size <= high)
        scale: Levels = np.zeros(low.shape, np.int64)
        factor: Levels = np.ones(low.shape, np.int64)
        fixed = self.grid.scales == (1, 1)
        scale[top == 0] = fixed
        waiting = open & (top > 0)
        level = self.level[:, :, which]
        bottom, peak = level.min(axis=0), level.max(axis=0)
        for part in range(1, int((self.grid.widest // np.maximum(top, 1))[waiting].max(initial=0)) + 1):
            for sign in (1, -1) if self.grid.levels[0] < 0 else (1,):
                value, factor_here = np.sign(d).astype(np.int64) * sign * (whole // part), sign * part
                ends = (bottom, peak) if sign > 0 else (-peak, -bottom)
                fits = waiting & (whole % part == 0) & (whole > 0) & self._holds(value, ends[0] * part, ends[1] * part)
                scale[fits], factor[fits] = value[fits], factor_here
                waiting &= ~fits
        return scale, factor, np.asarray((open & ~waiting).all(axis=0))

    def _holds(self, scale: Levels, bottom: Levels, peak: Levels) -> Mask:
        """Whether scale and levels are within their bounds."""
        (low, high), (first, last) = self.grid.levels, self.grid.scales
        if self.grid.minimums[1]:
            peak, low, high = peak - bottom, 0, high - low
        return (scale >= first) & (scale <= last) & (bottom >= low) & (peak <= high)

    def _keep(
        self, which: NDArray[np.int64], d: Doubles, dmin: Doubles, scale: Levels, minimum: Levels, level: Levels
    ) -> None:
        """Keep the blocks that prove right."""
        if not len(which):
            return
        levels = level.reshape(-1, len(which)) if self.grid.groups == 1 else _in_order(level)
        if self.type in RANGES:
            numbers = (np.asarray(a, np.float32) for a in (d, dmin, scale, minimum, levels))
            blocks = pack(Fields(self.type, *numbers))
        else:
            kind = block_type(self.type)
            assert issubclass(kind, GroupedBlock)
            blocks = np.zeros(len(which), kind.layout)
            blocks["d"] = d
            if kind.offset:
                blocks[kind.offset] = -dmin
            kind.put_levels(np.ascontiguousarray(levels.T.astype(np.int8)), blocks)
        data = blocks.view(np.uint8).reshape(len(which), -1)
        right = gives_back(data, self.type, self.x[which], self.stored)
        self.out[which[right]], self.done[which[right]] = data[right], True


def _in_order(level: Levels) -> Levels:
    """Levels (size, groups, n) as they follow each other in a block: (groups * size, n)."""
    return level.transpose(1, 0, 2).reshape(-1, level.shape[2])
