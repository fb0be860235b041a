"""What all scale searches stand on: rounding as ggml rounds, ordered sums, reused working memory."""

from __future__ import annotations

import math
import threading
from functools import cache, reduce

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

GROUP_MAX_EPS = np.float32(1e-15)  # ggml: a group whose largest weight is below this is all zero
CACHE_LINE = 64  # bytes
TRANSPOSED = 1 << 13  # elements at once: what fits the first cache is transposed a third faster
LIMIT = 1 << 22  # beyond it ggml's rounding wraps around
MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds a float to the nearest integer, ties to even


def f32(value: float) -> np.float32:
    """A Python number as the C code's float constant."""
    return np.float32(value)


def nearest_int(x: Floats) -> NDArray[np.int32]:
    """Round half to even as ggml's `nearest_int`, which wraps beyond `LIMIT`, sends infinity to -LIMIT and NaN to 0."""
    return ((x + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


class _Scratch(threading.local):
    """This thread's working memory, by purpose."""

    def __init__(self) -> None:
        self.arrays: dict[str, Floats] = {}


_scratch = _Scratch()


def scratch(purpose: str, shape: tuple[int, ...]) -> Floats:
    """Uninitialised float32 working memory, the same each time for one purpose, aligned to a cache line.

    Fresh arrays of this size would be mapped and unmapped by the allocator for every tile, and their page faults cost
    more than the arithmetic; alignment makes work in place up to 1.4 times faster. Tiles differ a little in size, so
    memory is kept by purpose and grows to the largest. Two arrays that are in use at the same time need two purposes.
    """
    size = math.prod(shape)
    found = _scratch.arrays.get(purpose)
    if found is None or found.size < size:
        raw = np.empty(4 * size + CACHE_LINE, np.uint8)
        start = -raw.ctypes.data % CACHE_LINE
        found = _scratch.arrays[purpose] = raw[start : start + 4 * size].view(np.float32)
    return found[:size].reshape(shape)


def byte_scratch(purpose: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The same of bytes."""
    size = math.prod(shape)
    return scratch(purpose, (-(-size // 4),)).view(np.uint8)[:size].reshape(shape)


def as_groups(x: Floats, size: int, purpose: str = "groups") -> Floats:
    """Blocks (n, block size) as columns of `size` elements: shape (size, n * block size / size), in working memory."""
    columns = x.reshape(-1, size).T
    groups = scratch(purpose, columns.shape)
    step = TRANSPOSED // size
    for start in range(0, columns.shape[1], step):
        groups[:, start : start + step] = columns[:, start : start + step]
    return groups


def add_up(terms: Floats, out: Floats | None = None) -> Floats:
    """Sum along the axis before the last, first element first, as a C loop adds: (..., group size, groups).

    `terms` must be C-contiguous: along a contiguous axis NumPy would add pairwise. One column alone is one.
    """
    if terms.shape[-1] == 1:
        total: Floats = np.add.accumulate(terms, axis=-2)[..., -1, :]
        if out is not None:
            out[...] = total
        return total
    return np.add.reduce(terms, axis=-2, out=out)


def dot(*factors: Floats, out: Floats | None = None) -> Floats:
    """Sums of products along that axis as a C loop adds them, of two or three factors: (..., group size, groups).

    Equals `add_up(a * b * c)`, and starts from +0 as C does. The last axis of all must be contiguous.
    """
    if factors[0].shape[-1] == 1 or not einsum_rounds_products():
        return add_up(reduce(np.multiply, factors), out)
    total: Floats = np.einsum(SUMS_OF_PRODUCTS[len(factors)], *factors, out=out)
    return total


SUMS_OF_PRODUCTS = {2: "...ij,...ij->...j", 3: "...ij,...ij,...ij->...j"}


@cache
def einsum_rounds_products() -> bool:
    """Whether this NumPy's einsum rounds a product before it adds it.

    Then it does in one pass what takes two or three; where it was compiled to fused multiply-adds, its sums differ from
    ggml's. Some random products of full precision tell: about every second fused sum would come out different.
    """
    a = np.modf(np.arange(1, 16 * 67 + 1) * 0.6180339887498949)[0].astype(np.float32).reshape(16, 67)
    b, c = np.ascontiguousarray(a[::-1, ::-1]), np.ascontiguousarray(a[:, ::-1])
    return all(
        np.array_equal(np.einsum(SUMS_OF_PRODUCTS[len(some)], *some), np.add.reduce(reduce(np.multiply, some), axis=0))
        for some in ((a, b), (a, b, c))
    )


def round_into(t: Floats, low: int, high: int, finite: bool) -> None:
    """Round `t` in place, then clip to `low..high`; `finite` promises that |t| < LIMIT everywhere, else it is seen."""
    if finite or (t.size and t.min() > -LIMIT and t.max() < LIMIT):
        np.rint(t, out=t)
    else:
        t[...] = nearest_int(t)
    t.clip(f32(low), f32(high), out=t)  # one pass; np.maximum with a scalar is three times slower


def extreme(x: Floats) -> Floats:
    """The element of largest magnitude of each group, the first of equals; shape (groups,)."""
    top, bottom = x.max(axis=0), x.min(axis=0)
    opposite = -bottom
    peak: Floats = np.where(top > opposite, top, bottom)
    tie = np.flatnonzero(top == opposite)
    if len(tie):
        first = np.abs(x[:, tie]).argmax(axis=0)
        peak[tie] = x[first, tie]
    return peak


def winners(group: NDArray[np.intp], sum_qx: Floats, sum_q2: Floats, best: Floats) -> NDArray[np.intp]:
    """The candidate that C's loop ends with in each group: each replaces the best so far if it explains more.

    Args:
        group: of each candidate, in order; candidates of one group in the order of C's loop.
        sum_qx, sum_q2: sums of w * q * x and of w * q^2 of each candidate.
        best: what has to be beaten, shape (groups,); what the winners reach afterwards.

    Returns:
        numbers of candidates, shape (groups,), -1 where none wins.
    """
    chosen = np.full(len(best), -1, np.intp)
    rank = np.arange(len(group)) - np.searchsorted(group, group)  # place of each among those of its group
    for r in range(int(rank.max(initial=-1)) + 1):
        here = np.flatnonzero(rank == r)
        g, qx, q2 = group[here], sum_qx[here], sum_q2[here]
        won = np.flatnonzero((q2 > 0) & (qx * qx > best[g] * q2))
        chosen[g[won]] = here[won]
        best[g[won]] = qx[won] / q2[won] * qx[won]
    return chosen
