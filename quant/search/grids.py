"""The grids of the IQ types: the few points of a lattice that 8 (or 4) neighbouring weights may be rounded to.

A point is 8 levels 0..2 or 4 levels 0..7; its place on the lattice is 2 * level + 1. The points come from the `gguf`
package, which is imported only when a grid is first used. For a lattice point that is not on the grid, the search
looks at the grid points nearest to it: these lists equal those of `iq2xs_init_impl` and `iq3xs_init_impl`
(ggml/src/ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

COLUMNS = 512  # points of a search whose distances are tabulated at once


@dataclass(frozen=True)
class Neighbours:
    """Lists of grid points.

    Attributes:
        starts, counts: where the list of each code begins, and its length, shape (codes,).
        points: all lists in a row.
        packed: the same points as places on the lattice, four bits each, the first lowest.
        halves: codes of their first and their second half times COLUMNS, shape (2, ...).
    """

    starts: Ints
    counts: NDArray[np.int16]
    points: NDArray[np.int16]
    packed: NDArray[np.int32]
    halves: NDArray[np.uint16]


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
    def neighbours(self) -> Neighbours:
        """Lists of grid points near each code that is not on the grid: nearest first, then in the grid's order."""
        codes = np.flatnonzero(self.index < 0)
        starts, counts = np.zeros(len(self.index), np.int64), np.zeros(len(self.index), np.int16)
        lists, total = [], 0
        for part in np.array_split(codes, max(1, len(codes) * len(self.levels) // (1 << 20))):
            here = 2 * (part[:, None] // self.place % (self.top + 1)).astype(np.float32) + 1
            # Squared distances: sums of small integers, exact in any order.
            far = (here**2).sum(axis=1)[:, None] - 2 * (here @ self.lattice) + (self.lattice**2).sum(axis=0)
            near = far <= self._reach(far)[:, None]
            row, point = np.nonzero(near)
            lists.append(point[np.lexsort((point, far[row, point], row))])
            counts[part] = near.sum(axis=1)
            starts[part] = total + np.cumsum(counts[part], dtype=np.int64) - counts[part]
            total += len(row)
        points = np.concatenate(lists)
        packed = (self.lattice.astype(np.int64).T << 4 * np.arange(len(self.lattice))).sum(axis=1)
        half = len(self.lattice) // 2
        codes = np.stack([self.levels[:, part] @ self.place[:half] for part in (slice(half), slice(half, None))])
        return Neighbours(
            starts,
            counts,
            points.astype(np.int16),
            packed.astype(np.uint32).view(np.int32)[points],
            np.ascontiguousarray(codes[:, points] * COLUMNS, np.uint16),
        )

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
