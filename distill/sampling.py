"""From a teacher's scores to what is kept of them: draws, the most probable tokens, or everything.

Draws go by the inverse of the cumulative distribution, in two levels: first a block of 64 tokens by the blocks' sums,
then a token within it, so that only the few blocks that are hit are ever summed up token by token. Draws with
replacement make a target that is right on average, while the most probable tokens alone are biased: Sparse Logit
Sampling, https://arxiv.org/abs/2503.16870.

The random numbers come from a counter: they depend on the seed, the document's tokens and the position, and on nothing
else. Every row is computed by itself, so a row's draws do not depend on what else is in its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.shards import Floats, Halfs, Ids, Rows
from gguforge.quant.errors import DataError

Draws = Literal["independent", "stratified"]
BLOCK = 64  # tokens of a block: few sums for large vocabularies, few tokens a draw for small ones
WORKED_ON = 1 << 18  # scores at a time: 1 MiB, which stays in cache
_HALVES = (32, 16, 8, 4, 2, 1)
_PER_COUNTER = 4  # 64-bit numbers that Philox makes from one value of its counter

Doubles = NDArray[np.float64]


def uniforms(seed: int, input_ids: Ids, draws: int, how: Draws, stream: int = 0) -> Doubles:
    """Random numbers in [0, 1) for every position of a document, shape (tokens, draws); another stream gives others.

    "independent": each for itself. "stratified": number j lies in [j / draws, (j + 1) / draws), which keeps every
    token's average and makes it vary less: 50 such draws are as near to the distribution as 100 independent ones, and
    need two thirds of their bytes.
    """
    digest = hashlib.sha256(np.array([seed, stream], "<u8").tobytes() + input_ids.astype("<i4").tobytes()).digest()
    counter = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    width = -(-draws // _PER_COUNTER) * _PER_COUNTER
    numbers = counter.random_raw(len(input_ids) * width).reshape(-1, width)[:, :draws]
    inside = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return inside if how == "independent" else (np.arange(draws) + inside) / draws


class Masses(NamedTuple):
    """Probabilities of some positions, up to a factor for each, in blocks.

    Attributes:
        sums: of each block, shape (rows, blocks).
        blocks: gives some blocks' masses, shape (wanted, BLOCK), for flat numbers row * blocks + block.
    """

    sums: Floats
    blocks: Callable[[NDArray[np.int64]], Floats]


def pick(masses: Masses, at: Doubles) -> Ids:
    """The tokens at which the cumulative distribution passes `at`, shapes (rows, draws)."""
    rows, count = masses.sums.shape
    edges = np.zeros((rows, count + 1))
    np.cumsum(masses.sums, axis=1, dtype=np.float64, out=edges[:, 1:])
    total = edges[:, -1:]
    targets = np.minimum(at * total, np.nextafter(total, 0))
    block = np.stack([edge.searchsorted(target, "right") for edge, target in zip(edges[:, 1:], targets, strict=True)])
    rest = targets - np.take_along_axis(edges, block, 1)
    share = rest / np.take_along_axis(masses.sums, block, 1)  # of the block's own mass
    chosen, back = np.unique(block + count * np.arange(rows)[:, None], return_inverse=True)
    inner = np.cumsum(masses.blocks(chosen), axis=1, dtype=np.float64)
    back = back.reshape(rows, -1)
    end = inner[back, -1]
    wanted = np.minimum(share * end, np.nextafter(end, 0))
    place = np.zeros_like(block)
    for step in _HALVES:  # binary search for the first place whose sum is above
        further = inner[back, place + step - 1] <= wanted
        place += step * further
    ids: Ids = (block * BLOCK + place).astype(np.int32)
    return ids


def counted(ids: Ids) -> tuple[NDArray[np.int64], Ids, Ids]:
    """Drawn ids, shape (rows, draws), as lengths of rows, ids from the lowest up, and their counts."""
    ids = np.sort(ids, axis=1)
    first = np.ones(ids.shape, np.bool_)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=ids.size)
    return first.sum(1), ids.reshape(-1)[starts], counts.astype(np.int32)


class Softmax:
    """Exponentials of scores, a few rows at a time, in memory that is kept.

    Attributes:
        log_total: log-sum-exp of each row of the last `load`, shape (rows,).
    """

    log_total: Floats

    def __init__(self, vocabulary: int) -> None:
        self.blocks = -(-vocabulary // BLOCK)
        self.rows = max(1, WORKED_ON // vocabulary)
        self._memory = np.zeros((self.rows, self.blocks * BLOCK), np.float32)
        self._vocabulary = vocabulary

    def load(self, scores: Floats, temperature: float = 1.0) -> Masses:
        """Work on at most `rows` rows; the result is overwritten by the next call.

        Raises:
            DataError: a score is NaN or infinite.
        """
        part = self._memory[: len(scores)]
        mass = part[:, : self._vocabulary]
        highest = scores.max(axis=1)
        if not np.isfinite(highest).all():
            raise DataError("the teacher's scores are not finite numbers", remedy="Use another file of this teacher.")
        np.subtract(scores, highest[:, None], out=mass)
        if temperature != 1:
            mass /= np.float32(temperature)
        np.exp(mass, out=mass)
        blocks = part.reshape(len(scores), self.blocks, BLOCK)
        sums = blocks.sum(axis=2)
        total = sums.sum(axis=1, dtype=np.float64)
        self.log_total = (highest / temperature + np.log(total)).astype(np.float32)
        flat = blocks.reshape(-1, BLOCK)
        return Masses(sums, lambda wanted: flat[wanted])


class Reducer:
    """Turns a teacher's scores into rows of targets.

    Args:
        kind, size: what to keep (see `gguforge.distill.shards`).
        temperature: scores are divided by it; `next_log_prob` and `lse` are those of the scores themselves.
        threads: that work on different rows; NumPy lets go of the interpreter's lock in large blocks.
    """

    def __init__(self, kind: str, size: int, vocabulary: int, temperature: float = 1.0, threads: int = 1) -> None:
        self.kind, self.size, self.vocabulary, self.temperature = kind, size, vocabulary, temperature
        self._softmaxes = [Softmax(vocabulary) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __call__(self, scores: Floats, next_ids: Ids, at: Doubles) -> Rows:
        """Rows from scores, shape (rows, vocabulary).

        Args:
            next_ids: the tokens that really came, shape (rows,).
            at: random numbers, shape (rows, draws).

        Raises:
            DataError: a score is NaN or infinite.
        """
        step = self._softmaxes[0].rows
        slices = [slice(start, start + step) for start in range(0, len(scores), step)]

        def every(first: int) -> list[Rows]:
            softmax = self._softmaxes[first]
            return [self._some(softmax, scores[p], next_ids[p], at[p]) for p in slices[first :: len(self._softmaxes)]]

        runs = (self._pool.map if self._pool else map)(every, range(len(self._softmaxes)))
        return Rows.joined([rows for group in zip_longest(*runs) for rows in group if rows is not None])

    def _some(self, softmax: Softmax, scores: Floats, next_ids: Ids, at: Doubles) -> Rows:
        masses = softmax.load(scores)
        lse = softmax.log_total
        next_log_prob = np.take_along_axis(scores, next_ids[:, None], 1)[:, 0] - lse
        log_total = lse
        if self.temperature != 1:
            masses = softmax.load(scores, self.temperature)
            log_total = softmax.log_total
            scores = scores / np.float32(self.temperature)
        if self.kind == "sampled":
            return sampled_rows(pick(masses, at), next_log_prob, lse)
        log_probs = scores - log_total[:, None]
        if self.kind == "full":
            return full_rows(log_probs, next_log_prob, lse)
        return top_k_rows(log_probs, self.size, next_log_prob, lse)


_NO_IDS, _NO_FLOATS, _NO_HALFS = np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float16)


def sampled_rows(ids: Ids, next_log_prob: Floats, lse: Floats) -> Rows:
    """Rows of draws, shape (rows, draws)."""
    return Rows(*counted(ids), _NO_HALFS, _NO_FLOATS, next_log_prob, lse)


def full_rows(log_probs: Floats, next_log_prob: Floats, lse: Floats) -> Rows:
    """Rows that keep everything."""
    lengths = np.full(len(log_probs), log_probs.shape[1])
    return Rows(lengths, _NO_IDS, _NO_IDS, _halfs(log_probs), _NO_FLOATS, next_log_prob, lse)


def top_k_rows(log_probs: Floats, k: int, next_log_prob: Floats, lse: Floats) -> Rows:
    """Rows of the k most probable tokens, and the mass of the others."""
    k = min(k, log_probs.shape[1])
    ids = np.argpartition(log_probs, log_probs.shape[1] - k, axis=1)[:, -k:]
    ids = np.take_along_axis(ids, np.lexsort((ids, -np.take_along_axis(log_probs, ids, 1)), axis=1), 1)
    kept = np.take_along_axis(log_probs, ids, 1)
    lengths = np.full(len(ids), k)
    tail = log_of_rest(np.exp(kept.astype(np.float64)).sum(1))
    return Rows(lengths, ids.reshape(-1).astype(np.int32), _NO_IDS, _halfs(kept).reshape(-1), tail, next_log_prob, lse)


def log_of_rest(kept: Doubles) -> Floats:
    """Logarithm of what is missing to 1; -inf where nothing is, which float32 scores cannot tell below 1e-6."""
    rest = 1 - kept
    return np.log(rest, out=np.full(len(rest), -np.inf), where=rest > 1e-6).astype(np.float32)


def _halfs(log_probs: Floats) -> Halfs:
    """Half-precision, where numbers below its range become the lowest."""
    return np.maximum(log_probs, np.finfo(np.float16).min).astype(np.float16)


def mixture(parts: list[Rows], weights: list[float]) -> Rows:
    """Draws from several teachers at the same positions as draws from their weighted mixture.

    A mixture has no scores of its own: its `lse` is 0.
    """
    rows = len(parts[0].lengths)
    row = np.concatenate([np.repeat(np.arange(rows), part.lengths) for part in parts])
    ids, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "counts"))
    width = int(ids.max(initial=0)) + 1
    places, back = np.unique(row * width + ids, return_inverse=True)
    summed = np.bincount(back, counts, len(places)).astype(np.int32)
    lengths = np.bincount(places // width, minlength=rows)
    logs = np.stack([np.log(weight) + part.next_log_prob for part, weight in zip(parts, weights, strict=True)])
    next_log_prob = np.logaddexp.reduce(logs, axis=0).astype(np.float32)
    return Rows(
        lengths,
        (places % width).astype(np.int32),
        summed,
        _NO_HALFS,
        _NO_FLOATS,
        next_log_prob,
        np.zeros_like(next_log_prob),
    )
