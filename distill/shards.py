"""One file of soft targets: documents, which of their tokens count, and a teacher's distribution before each of these.

Arrays of a shard of D documents, T tokens, R rows and E entries (safetensors; see `gguforge.distill.arrays`):

    input_ids     u16[T], or u32 when the vocabulary is larger than 65,536
    loss_mask     u8[T]    1 where the student is to predict this token from those before it
    doc_start     u32[D+1] document d is tokens doc_start[d]:doc_start[d + 1]; it is read from an empty context
    row_length    u8[R]    entries of each row (u16 or u32 where a row may have more); none for "full"
    entries       u16[E], u8[E, 3] or u32[E]    "sampled": id * draws + (count - 1), little-endian, in as few bytes
    ids           u16[E] or u32[E]              "top-k": from the most probable down
    log_probs     f16[E] for "top-k", f16[R, V] for "full"
    tail          f16[R]   "top-k": natural logarithm of the mass that the entries leave out, -inf for none
    next_log_prob f16[R]   the teacher's own log-probability of the token that follows
    lse           f16[R]   log-sum-exp of its scores: a token's score is its log-probability plus this

There is a row for every token that counts, in the order of the tokens: the distribution after the token before it. That
shift by one happens in `predicting` and nowhere else. A document's first token is predicted by nothing, never counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.arrays import Array, read_arrays, write_arrays
from gguforge.quant.errors import InputError

Kind = Literal["sampled", "top-k", "full"]
KINDS: tuple[Kind, ...] = ("sampled", "top-k", "full")
_ROUNDING = 1e-2  # a log-probability may be above 0 by so much
MAX_ENTRY = 1 << 32  # vocabulary * draws may not be more: an entry has at most 32 bits

Ids = NDArray[np.int32]
Halfs = NDArray[np.float16]
Floats = NDArray[np.float32]


def predicting(loss_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of one document whose distribution is wanted: row i predicts token i + 1.

    >>> predicting(np.array([False, True, False, True])).tolist()
    [0, 2]
    """
    return np.flatnonzero(loss_mask[1:])


@dataclass(frozen=True)
class Layout:
    """What a shard's rows hold.

    Attributes:
        kind: "sampled", "top-k" or "full".
        size: draws of a sampled row, entries of a top-k row; 0 for full ones.
        vocabulary: scores that the teacher gives one position.
    """

    kind: Kind
    size: int
    vocabulary: int


@dataclass(frozen=True, eq=False)
class Rows:
    """A teacher's distributions at some positions, to be written.

    Attributes:
        lengths: entries of each row, shape (rows,).
        ids: shape (entries,); empty for "full", whose rows hold every id in order.
        counts: how often each id was drawn, shape (entries,); for "sampled" only.
        log_probs: shape (entries,) for "top-k", (rows, vocabulary) for "full", else empty.
        tail: log of the mass left out, shape (rows,); for "top-k" only.
        next_log_prob, lse: shape (rows,).
    """

    lengths: NDArray[np.int64]
    ids: Ids
    counts: Ids
    log_probs: Halfs
    tail: Floats
    next_log_prob: Floats
    lse: Floats

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Several behind each other; at least one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def none(cls, layout: Layout) -> Rows:
        """No rows of this layout."""
        ids, floats = np.empty(0, np.int32), np.empty(0, np.float32)
        halfs = np.empty((0, layout.vocabulary) if layout.kind == "full" else 0, np.float16)
        return cls(np.empty(0, np.int64), ids, ids, halfs, floats, floats, floats)


@dataclass(frozen=True, eq=False)
class Scored:
    """A document to be written: token ids, which of them count, and a row for each of these."""

    input_ids: Ids
    loss_mask: NDArray[np.bool_]
    rows: Rows


@dataclass(frozen=True, eq=False)
class Document:
    """A document as a student reads it, R rows with E entries in all.

    Attributes:
        input_ids: shape (tokens,), int32.
        loss_mask: shape (tokens,), bool.
        positions: shape (R,), int64: row r is the distribution after the token at positions[r], so it belongs to the
            student's scores at positions[r], and the token that really came is input_ids[positions[r] + 1].
        row_ptr: shape (R + 1,), int64: the entries of row r are row_ptr[r]:row_ptr[r + 1].
        ids: shape (E,), int32: token ids.
        weights: shape (E,), float32: their probabilities. A sampled row adds up to 1 and is right on average over
            draws; of a top-k row `tail` is missing.
        tail: shape (R,), float32: probability that the entries leave out; 0 unless "top-k".
        next_log_prob: shape (R,), float32: the teacher's log-probability of the token that really came.
        lse: shape (R,), float32: log-sum-exp of the teacher's scores.
    """

    input_ids: Ids
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int64]
    row_ptr: NDArray[np.int64]
    ids: Ids
    weights: Floats
    tail: Floats
    next_log_prob: Floats
    lse: Floats


def write_shard(
    path: Path, documents: Sequence[Scored], layout: Layout, remarks: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write documents.

    Raises:
        OutputError: the file exists, or does not fit on the disk.
    """
    for document in documents:
        assert not document.loss_mask[0]
        assert len(document.rows.lengths) == len(predicting(document.loss_mask))
    rows = Rows.joined([Rows.none(layout), *(document.rows for document in documents)])
    sizes = [len(document.input_ids) for document in documents]
    nothing = np.empty(0, np.uint8)
    arrays: dict[str, Array] = {
        "input_ids": np.concatenate([nothing, *(document.input_ids for document in documents)]).astype(
            _id_type(layout)
        ),
        "loss_mask": np.concatenate([nothing, *(document.loss_mask for document in documents)]).astype(np.uint8),
        "doc_start": np.cumsum([0, *sizes]).astype(np.uint32),
        "next_log_prob": _halfs(rows.next_log_prob),
        "lse": _halfs(rows.lse),
    }
    if layout.kind == "full":
        arrays["log_probs"] = rows.log_probs
    else:
        arrays["row_length"] = rows.lengths.astype(np.min_scalar_type(layout.size))
    if layout.kind == "sampled":
        arrays["entries"] = _pack(rows.ids, rows.counts, layout)
    if layout.kind == "top-k":
        arrays |= {"ids": rows.ids.astype(_id_type(layout)), "log_probs": rows.log_probs, "tail": _halfs(rows.tail)}
    write_arrays(path, arrays, remarks, overwrite=overwrite)


def _halfs(values: Floats) -> Halfs:
    """Half precision; what is beyond its range becomes the nearest that is within, -inf stays."""
    limit = np.finfo(np.float16).max
    return np.where(np.isneginf(values), values, np.clip(values, -limit, limit)).astype(np.float16)


def _id_type(layout: Layout) -> np.dtype[np.unsignedinteger]:
    return np.dtype(np.uint16 if layout.vocabulary <= 1 << 16 else np.uint32)


def _entry_bytes(layout: Layout) -> int:
    """2, 3 or 4.

    Example: 50 draws need 3 bytes for vocabularies up to 335,544 tokens.
    """
    return max(2, -(-(layout.vocabulary * layout.size - 1).bit_length() // 8))


def _pack(ids: Ids, counts: Ids, layout: Layout) -> Array:
    numbers = (ids.astype(np.int64) * layout.size + counts - 1).astype("<u4")
    width = _entry_bytes(layout)
    if width == 3:
        return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4)[:, :3])
    return numbers.astype(f"<u{width}")


def _unpack(entries: Array, layout: Layout) -> tuple[Ids, Ids]:
    """Ids and counts of some entries."""
    if entries.ndim == 2:
        whole = np.zeros((len(entries), 4), np.uint8)
        whole[:, :3] = entries
        entries = whole.view("<u4")[:, 0]
    ids, counts = np.divmod(entries.astype(np.int64), layout.size)
    return ids.astype(np.int32), (counts + 1).astype(np.int32)


class Shard:
    """A shard that was opened and found consistent; documents are decoded when they are asked for.

    Attributes:
        path: where it lies.
        documents, tokens, rows, entries: how many there are.
        nbytes: of the file.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._arrays = arrays = read_arrays(path)
        _check_types(path, arrays, layout)
        self._starts = arrays["doc_start"].astype(np.int64)
        mask = arrays["loss_mask"]
        self.tokens, self.documents, self.nbytes = len(mask), len(self._starts) - 1, path.stat().st_size
        _check_documents(path, self._starts, arrays)
        self._first_row = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[self._starts]
        self.rows = int(self._first_row[-1])
        full = layout.kind == "full"
        lengths = np.full(self.rows, layout.vocabulary) if full else arrays["row_length"].astype(np.int64)
        self._row_ptr = np.concatenate([[0], np.cumsum(lengths)])
        self.entries = int(self._row_ptr[-1])
        _check_rows(path, arrays, self.rows, self.entries, layout)

    @property
    def next_log_prob(self) -> Halfs:
        """The teacher's log-probability of every token that counts, shape (rows,)."""
        return self._arrays["next_log_prob"]

    def document(self, number: int) -> Document:
        """Decode one document."""
        tokens = slice(*self._starts[number : number + 2].tolist())
        rows = slice(*self._first_row[number : number + 2].tolist())
        row_ptr = self._row_ptr[rows.start : rows.stop + 1]
        ids, weights, tail = self._decoded(rows, slice(int(row_ptr[0]), int(row_ptr[-1])))
        mask = self._arrays["loss_mask"][tokens].astype(np.bool_)
        with np.errstate(invalid="ignore"):  # some NaNs are noisy
            told = (self._arrays[name][rows].astype(np.float32) for name in ("next_log_prob", "lse"))
            return Document(
                self._arrays["input_ids"][tokens].astype(np.int32), mask, predicting(mask), row_ptr - row_ptr[0],
                ids, weights, tail, *told,
            )  # fmt: skip

    def _decoded(self, rows: slice, entries: slice) -> tuple[Ids, Floats, Floats]:
        """Ids and weights of some entries, and the tails of their rows."""
        arrays, layout = self._arrays, self.layout
        count = rows.stop - rows.start
        no_tail = np.zeros(count, np.float32)
        if layout.kind == "sampled":
            ids, counts = _unpack(arrays["entries"][entries], layout)
            return ids, counts.astype(np.float32) / np.float32(layout.size), no_tail
        if layout.kind == "full":
            ids = np.tile(np.arange(layout.vocabulary, dtype=np.int32), count)
            return ids, np.exp(arrays["log_probs"][rows].astype(np.float32)).reshape(-1), no_tail
        weights = np.exp(arrays["log_probs"][entries].astype(np.float32))
        return arrays["ids"][entries].astype(np.int32), weights, np.exp(arrays["tail"][rows].astype(np.float32))


def _check_types(path: Path, arrays: Mapping[str, Array], layout: Layout) -> None:
    """The arrays of this layout and no others, each of its type and number of axes."""
    id_type, half = _id_type(layout), np.dtype(np.float16)
    wanted = {
        "input_ids": (id_type, 1), "loss_mask": (np.dtype(np.uint8), 1), "doc_start": (np.dtype(np.uint32), 1),
        "next_log_prob": (half, 1), "lse": (half, 1),
    }  # fmt: skip
    if layout.kind == "full":
        wanted["log_probs"] = (half, 2)
    else:
        wanted["row_length"] = (np.dtype(np.min_scalar_type(layout.size)), 1)
    if layout.kind == "sampled":
        width = _entry_bytes(layout)
        wanted["entries"] = (np.dtype("u1"), 2) if width == 3 else (np.dtype(f"u{width}"), 1)
    if layout.kind == "top-k":
        wanted |= {"ids": (id_type, 1), "log_probs": (half, 1), "tail": (half, 1)}
    found = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    if found != wanted:
        raise InputError("is no shard of these targets: other arrays or types", path=path)


def _check_documents(path: Path, starts: NDArray[np.int64], arrays: Mapping[str, Array]) -> None:
    mask, tokens = arrays["loss_mask"], len(arrays["input_ids"])
    sound = len(starts) >= 1 and starts[0] == 0 and starts[-1] == tokens == len(mask)
    if not sound or not (np.diff(starts) > 0).all() or mask.max(initial=0) > 1 or mask[starts[:-1]].any():
        raise InputError("documents and tokens do not fit together", path=path)


def _check_rows(path: Path, arrays: Mapping[str, Array], rows: int, entries: int, layout: Layout) -> None:
    sizes = {name: rows for name in ("next_log_prob", "lse", "row_length", "tail") if name in arrays}
    if layout.kind == "full":
        sound = arrays["log_probs"].shape == (rows, layout.vocabulary)
    else:
        ids = _unpack(arrays["entries"], layout)[0] if layout.kind == "sampled" else arrays["ids"]
        sizes |= {name: entries for name in ("entries", "ids", "log_probs") if name in arrays}
        sound = bool((ids < layout.vocabulary).all()) and bool((arrays["row_length"] <= layout.size).all())
    sound &= bool((arrays["input_ids"] < layout.vocabulary).all())
    sound &= all(bool((arrays[name] <= _ROUNDING).all()) for name in ("log_probs", "tail") if name in arrays)
    if not sound or any(len(arrays[name]) != size for name, size in sizes.items()):
        raise InputError("rows and entries do not fit together", path=path)
