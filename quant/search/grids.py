"""The grids of the IQ types: the few points of a lattice that 8 (or 4) neighbouring weights may be rounded to.

A point is 8 levels 0..2 or 4 levels 0..7; its place on the lattice is 2 * level + 1. The points come from the `gguf`
package, which is imported only when a grid is first used. For a lattice point that is not on the grid, the search
looks at the grid points nearest to it: these lists equal those of `iq2xs_init_impl` and `iq3xs_init_impl`
(ggml/src/ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

COLUMNS = 512  # lattice points whose distances are tabulated at once


@dataclass(frozen=True)
class Neighbours:
    """Lists of grid points.

    Attributes:
        starts, counts: where the list of each code begins, and its length, shape (codes,).
        points: all lists in a row, in the order of their codes.
    """

    starts: Ints
    counts: NDArray[np.int16]
    points: NDArray[np.int16]


class Lists:
    """Lists of grid points, filled up to the same length with the number after the last.

    Args:
        grid: the grid.
        counts: the length of the list of each code, shape (codes,).
        points: shape (longest, codes).
    """

    def __init__(self, grid: Grid, counts: NDArray[np.int16], points: NDArray[np.int16]) -> None:
        self.grid, self.counts, self.points = grid, counts, points

    def point(self, rank: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.int16]:
        """Grid points of some ranks in the lists of some codes."""
        found: NDArray[np.int16] = self.points.take(rank * np.intp(self.points.shape[1]) + codes, mode="clip")
        return found

    @cached_property
    def packed(self) -> NDArray[np.int32]:
        """Their places on the lattice, packed, shape (longest, codes)."""
        return self.grid.packed.take(self.points)

    @cached_property
    def halves(self) -> NDArray[np.uint16]:
        """Codes of their first and their second half times COLUMNS, shape (2, longest, codes).

        What fills up has half codes that are one too high.
        """
        levels, place = self.grid.levels, self.grid.place
        half = len(place) // 2
        halves = np.full((2, len(levels) + 1), place[half] * COLUMNS, np.uint16)
        for codes, part in zip(halves, (slice(half), slice(half, None)), strict=True):
            codes[:-1] = levels[:, part] @ place[:half] * COLUMNS
        return halves.take(self.points, axis=1)


class Grid:
    """One grid.

    Args:
        levels: shape (points, 8 or 4).
        values: what each level stands for in a decoded block.
        shells: how many different distances a list of neighbours spans.

    Attributes:
        top: the highest level.
        points: decoded values, shape (points, 8 or 4).
        place: digits of a lattice point's code: code = sum of level * place.
        index: grid point of each code, or -1, shape (codes,).
    """

    def __init__(self, levels: Bytes, values: Floats, shells: int) -> None:
        self.levels, self.shells = levels, shells
        self.top = len(values) - 1
        self.points: Floats = values[levels]
        self.place: Ints = len(values) ** np.arange(levels.shape[1], dtype=np.int64)
        self.index = np.full(len(values) ** levels.shape[1], -1, np.int16)
        self.index[levels @ self.place] = np.arange(len(levels))

    @cached_property
    def lattice(self) -> Floats:
        """Places on the lattice, 2 * level + 1, shape (8 or 4, points)."""
        return np.ascontiguousarray(2 * self.levels.T.astype(np.float32) + 1)

    @cached_property
    def powers(self) -> NDArray[np.complex64]:
        """The same places, and as imaginary parts their squares: both are looked up together."""
        return (self.lattice + 1j * self.lattice**2).astype(np.complex64)

    @cached_property
    def packed(self) -> NDArray[np.int32]:
        """The same places, four bits each, the first lowest; shape (points + 1,), the last means nothing."""
        places = np.append(self.lattice, np.zeros((len(self.place), 1), np.float32), axis=1).astype(np.int64)
        packed: NDArray[np.int32] = (
            (places.T << 4 * np.arange(len(places))).sum(axis=1).astype(np.uint32).view(np.int32)
        )
        return packed

    @cached_property
    def neighbours(self) -> Neighbours:
        """Lists of grid points near each code that is not on the grid: nearest first, then in the grid's order."""
        codes = np.flatnonzero(self.index < 0)
        starts, counts = np.zeros(len(self.index), np.int64), np.zeros(len(self.index), np.int16)
        lists, total = [], 0
        for part in np.array_split(codes, max(1, len(codes) * len(self.levels) // (1 << 20))):
            here = 2 * self._levels(part).astype(np.float32) + 1
            # Squared distances: sums of small integers, exact in any order.
            far = (here**2).sum(axis=1)[:, None] - 2 * (here @ self.lattice) + (self.lattice**2).sum(axis=0)
            near = far <= self._reach(far)[:, None]
            row, point = np.nonzero(near)
            lists.append(point[np.lexsort((far[row, point], row))])  # stable: of equals in the grid's order
            counts[part] = near.sum(axis=1)
            starts[part] = total + np.cumsum(counts[part], dtype=np.int64) - counts[part]
            total += len(row)
        points = np.concatenate(lists).astype(np.int16)
        return Neighbours(starts, counts, points)

    @cached_property
    def lists(self) -> Lists:
        """All neighbours."""
        return self._filled(np.ones(len(self.neighbours.points), np.bool_))

    @cached_property
    def shortlists(self) -> Lists:
        """Those neighbours that can be the nearest to a point that was rounded to the code.

        Such a point is, in every direction, at most half a step from its lattice point (or beyond the end of the
        lattice). Of two different neighbours the one with fewer steps in that direction is no farther there. One that
        is as near or nearer in every direction leaves the other no chance, whatever the importance of the weights.
        """
        near, keep = self.neighbours, np.empty(len(self.neighbours.points), np.bool_)
        for count in np.unique(near.counts[near.counts > 0]):
            codes = np.flatnonzero(near.counts == count)
            at = near.starts[codes][:, None] + np.arange(count)
            steps = self.levels[near.points[at]].astype(np.int64) - self._levels(codes)[:, None]
            sets = self._farther(steps)
            others, beaten = ~sets, np.zeros(at.shape, np.bool_)
            for k in range(count):
                beats = (sets[:, k, None] & others) == 0
                beats[:, k] = False
                beaten |= beats
            keep[at] = ~beaten
        return self._filled(keep)

    def _levels(self, codes: Ints) -> Ints:
        """Levels of lattice points, shape (codes, 8 or 4)."""
        return codes[:, None] // self.place % (self.top + 1)

    def _farther(self, steps: Ints) -> NDArray[np.uint32 | np.uint64]:
        """Steps of points in each direction, shape (..., 8 or 4), as sets of bits: the farther the more.

        In one direction -1 is {0}, 1 is {1}, -2 is {0, 1, 2}, 2 is {0, 1, 3}... Shape (...).
        """
        size = np.abs(steps)
        sets = np.where(size > 0, (1 << 2 * (size - 1).clip(0)) - 1 | 1 << 2 * (size - 1).clip(0) + (steps > 0), 0)
        joined: Ints = (sets << 2 * self.top * np.arange(steps.shape[-1])).sum(axis=-1)
        fits: type[np.uint32 | np.uint64] = np.uint32 if 2 * self.top * steps.shape[-1] <= 32 else np.uint64
        return joined.astype(fits)

    def _filled(self, keep: Mask) -> Lists:
        """The neighbours marked, as a rectangle."""
        near, n = self.neighbours, len(self.levels)
        kept = np.flatnonzero(keep)
        code = np.repeat(np.arange(len(near.counts)), near.counts)[kept]
        counts = np.bincount(code, minlength=len(near.counts))
        rank = np.arange(len(kept)) - (np.cumsum(counts) - counts)[code]
        points = np.full((counts.max(), len(counts)), n, np.int16)
        points[rank, code] = near.points[kept]
        return Lists(self, counts.astype(np.int16), points)

    def _reach(self, far: Floats) -> Floats:
        """The distance that the list of each row of `far` ends with, shape (rows,)."""
        reach: Floats = far.min(axis=1)
        for _ in range(self.shells - 1):
            beyond = np.where(far > reach[:, None], far, np.inf).min(axis=1)
            reach = np.where(np.isfinite(beyond), beyond, reach)
        return reach


SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}


@cache
def grid(name: str) -> Grid:
    """The grid of a block type (IQ1_M shares that of IQ1_S)."""
    import gguf.quants  # late: only these types need it, and it takes longer to import than most commands run

    source = getattr(gguf.quants, name)
    source.init_grid()
    values = np.array(source.grid_map, np.float32)
    levels = np.searchsorted(values, source.grid.reshape(source.grid_shape)).astype(np.uint8)
    return Grid(levels, values, SHELLS[name])
