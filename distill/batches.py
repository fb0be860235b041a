"""What a student reads: documents from soft targets or from text, and batches of them as tensors.

Which documents make a batch is a function of the seed, the step and the process, of nothing that was done before. So a
run that is taken up again reads on where it stopped, and several processes read different documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.data import documents, read_corpus
from gguforge.distill.losses import Entries
from gguforge.distill.shards import Document, Ids, predicting
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ALL_TEXT = 1 << 62  # bytes of a shard, where text is not divided


def untaught(input_ids: Ids, loss_mask: NDArray[np.bool_]) -> Document:
    """A document without a teacher's rows."""
    positions = predicting(loss_mask)
    none, rows = np.zeros(0, np.float32), np.zeros(len(positions), np.float32)
    return Document(
        input_ids, loss_mask, positions, np.zeros(len(positions) + 1, np.int64), np.zeros(0, np.int32), none, rows,
        rows, rows,
    )  # fmt: skip


def read_documents(
    paths: Sequence[str | os.PathLike[str]], tokenizer: Tokenizer, context: int, limit: int | None = None
) -> list[Document]:
    """Text files as documents of at most `context` tokens; a limit takes some evenly from the whole.

    Raises:
        InputError: a file is empty, damaged, or gives no document.
    """
    corpus = read_corpus(paths, context, ALL_TEXT)
    found = [
        untaught(ids, mask)
        for shard in corpus.shards
        for passage in shard
        for ids, mask in documents(passage, tokenizer, context)
    ]
    found = [document for document in found if len(document.positions)]
    if not found:
        raise InputError("the text gives no document", path=Path(paths[0]))
    return evenly(found, limit)


def evenly(found: list[Document], limit: int | None) -> list[Document]:
    """At most `limit` documents, spread over all."""
    if limit is None or len(found) <= limit:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some documents side by side, the shorter ones padded with token 0.

    Attributes:
        input_ids: shape (batch, length), int64.
        attention: what is no padding, same shape, bool.
        places: where the scores lie that are trained, in the flattened (batch * length); shape (R,).
        tokens: the tokens that really came there, shape (R,).
        entries: the teacher's rows there, if it left any.
    """

    input_ids: Tensor
    attention: Tensor
    places: Tensor
    tokens: Tensor
    entries: Entries | None

    @property
    def size(self) -> int:
        """The tokens that are trained; documents, where an encoder's states are."""
        return len(self.places) or len(self.input_ids)


def make_batch(chosen: Sequence[Document], device: Any = "cpu") -> Batch:
    """Documents, at least one, as tensors on a device."""
    import torch

    length = max(len(document.input_ids) for document in chosen)
    ids = np.zeros((len(chosen), length), np.int64)
    attention = np.zeros((len(chosen), length), np.bool_)
    for i, document in enumerate(chosen):
        ids[i, : len(document.input_ids)] = document.input_ids
        attention[i, : len(document.input_ids)] = True
    places = np.concatenate([document.positions + i * length for i, document in enumerate(chosen)])
    tokens = np.concatenate([document.input_ids[document.positions + 1] for document in chosen]).astype(np.int64)
    input_ids, seen, where, came = (torch.from_numpy(array).to(device) for array in (ids, attention, places, tokens))
    return Batch(input_ids, seen, where, came, _entries(chosen, device))


def _entries(chosen: Sequence[Document], device: Any) -> Entries | None:
    import torch

    sizes = np.concatenate([np.diff(document.row_ptr) for document in chosen])
    if not sizes.any():
        return None
    ids, weights, tail = (
        np.concatenate([getattr(document, name) for document in chosen]) for name in ("ids", "weights", "tail")
    )
    arrays = np.repeat(np.arange(len(sizes)), sizes), ids.astype(np.int64), weights, tail
    row, columns, shares, rest = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    return Entries(row, columns, shares, rest if tail.any() else None)


@dataclass(frozen=True, eq=False)
class Reading:
    """The order in which documents are read: each once in a round, every round in another order.

    Attributes:
        material: the documents.
        batch: documents of a batch.
        accumulate: batches of a step.
        seed: of the orders.
        process, processes: this one's number, and how many read.
    """

    material: Sequence[Document]
    batch: int
    accumulate: int = 1
    seed: int = 0
    process: int = 0
    processes: int = 1

    def batches(self, step: int) -> list[list[Document]]:
        """The documents of each batch of a step, counted from 0; those of like length together, to pad little."""
        size = self.batch * self.processes
        first = step * self.accumulate * size + self.process * self.batch
        chosen = [
            self._document(first + number * size + i) for number in range(self.accumulate) for i in range(self.batch)
        ]
        if self.accumulate > 1:
            chosen.sort(key=lambda document: len(document.input_ids))
        return [chosen[start : start + self.batch] for start in range(0, len(chosen), self.batch)]

    def made(self, step: int, device: Any) -> Iterator[Batch]:
        """The same as tensors."""
        for chosen in self.batches(step):
            yield make_batch(chosen, device)

    def _document(self, number: int) -> Document:
        round_, place = divmod(number, len(self.material))
        return self.material[int(self._order(round_)[place])]

    def _order(self, round_: int) -> NDArray[np.int64]:
        kept: dict[int, NDArray[np.int64]] = self.__dict__.setdefault("_orders", {})
        if round_ not in kept:
            for old in [one for one in kept if one < round_ - 1]:
                del kept[old]
            kept[round_] = np.random.default_rng([self.seed, round_]).permutation(len(self.material))
        return kept[round_]
