"""Files of llama-perplexity's --kl-divergence-base: a text's tokens and a model's log-probabilities, in 16 bits each.

Written and read chunk by chunk. They are large: two bytes for every token of the vocabulary at every second position.
Format: llama.cpp, tools/perplexity/perplexity.cpp (log_softmax, process_logits, kl_divergence).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import InputError
from gguforge.quant.files import replacing
from gguforge.quant.sources import map_window
from gguforge.runtime.divergence import Positions, Softmax, blocks
from gguforge.runtime.forward import Logits, Tokens

MAGIC = b"_logits_"
HEADER_BYTES = len(MAGIC) + 12
DEPTH = np.float32(16)  # log-probabilities further below the largest are cut off
STEPS = np.float32(65535)
SMALLEST_STEP = np.finfo(np.float32).tiny  # the inverse of a smaller one is no float32; such a row is flat

Words = NDArray[np.uint16]


def row_words(vocabulary: int) -> int:
    """16-bit words of one position: two float32 (step and lowest log-probability), then an even number of steps."""
    return 2 * ((vocabulary + 1) // 2) + 4


def scored(chunk: int) -> int:
    """Positions of a chunk that are scored: from the middle to the last but one."""
    return chunk - 1 - chunk // 2


@dataclass(frozen=True, eq=False)
class LogitFile:
    """A file that was found whole.

    Attributes:
        path: where it lies.
        vocabulary: scores of one position.
        chunks: the tokens, shape (chunks, tokens of a chunk).
    """

    path: Path
    vocabulary: int
    chunks: Tokens

    def rows(self, chunk: int) -> Words:
        """One chunk's rows, shape (scored positions, words); a memory map."""
        count, size = scored(self.chunks.shape[1]), 2 * row_words(self.vocabulary)
        offset = HEADER_BYTES + self.chunks.nbytes + chunk * count * size
        return map_window(str(self.path), offset, count * size).view("<u2").reshape(count, -1)


def is_logit_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_logit_file(path: str | os.PathLike[str]) -> LogitFile:
    """Read the header and the tokens, and check that the rest is there.

    Raises:
        InputError: it is damaged, or something else.
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise InputError(
                "is no file of log-probabilities", path=path, remedy="Make one with: gguforge evaluate --save-base"
            )
        chunk, vocabulary, count = np.frombuffer(head, "<i4", 3, len(MAGIC)).tolist()
        if min(vocabulary, count) < 1 or chunk < 4:
            raise InputError("the file's sizes make no sense", path=path, found=f"{chunk}, {vocabulary}, {count}")
        wanted = HEADER_BYTES + 4 * chunk * count + 2 * row_words(vocabulary) * scored(chunk) * count
        if size != wanted:
            raise InputError(
                "the file is cut short or damaged", path=path, expected=f"{wanted} bytes", found=f"{size} bytes"
            )
        tokens = np.frombuffer(file.read(4 * chunk * count), "<i4").astype(np.int32)
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError("the file's tokens are not in its vocabulary", path=path)
    return LogitFile(path, vocabulary, tokens.reshape(count, chunk))


@contextmanager
def writing_logit_file(
    path: str | os.PathLike[str], chunks: Tokens, vocabulary: int, overwrite: bool = False
) -> Iterator[BinaryIO]:
    """A file to which the rows of all chunks are appended; it takes its name when the block ends well.

    Raises:
        OutputError: it exists, or does not fit on the disk.
    """
    count, chunk = chunks.shape
    size = HEADER_BYTES + chunks.nbytes + 2 * row_words(vocabulary) * scored(chunk) * count
    with replacing(Path(path), size, overwrite) as part, part.open("r+b") as file:
        file.write(MAGIC + np.array([chunk, vocabulary, count], "<i4").tobytes() + chunks.astype("<i4").tobytes())
        yield file


def pack(logits: Logits) -> Words:
    """Scores, shape (positions, vocabulary), as rows of the file, shape (positions, words)."""
    rows = np.zeros((len(logits), row_words(logits.shape[1])), "<u2")
    softmax = Softmax()
    for part in blocks(*logits.shape):
        x = logits[part]
        softmax.load(x)
        log_total = softmax.log_total.astype(np.float32)
        lowest = np.maximum(x.min(axis=1), softmax.highest - DEPTH)
        step = (softmax.highest - lowest) / STEPS
        head = np.stack([step, lowest - softmax.highest - log_total], axis=1).astype("<f4")
        rows[part, :4] = head.view("<u2")
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step >= SMALLEST_STEP)
        steps = np.rint(inverse[:, None] * (x - lowest[:, None]))
        rows[part, 4 : 4 + x.shape[1]] = np.maximum(steps, 0)
    return rows


def compare_packed(logits: Logits, rows: Words, targets: Tokens) -> Positions:
    """A model's scores against a file's rows at the same positions, as llama-perplexity compares them."""
    softmax = Softmax()
    surprise, base_surprise, divergence = (np.empty(len(logits)) for _ in range(3))
    same = np.empty(len(logits), np.bool_)
    for part in blocks(*logits.shape):
        q, wanted = logits[part], targets[part]
        softmax.load(q)
        surprise[part] = softmax.surprise(q, wanted)
        base = unpack(rows[part], q.shape[1])
        base_surprise[part] = -np.take_along_axis(base, wanted[:, None], axis=1)[:, 0]
        weights = np.exp(base) * (base > -DEPTH)
        base -= q
        base += (softmax.highest + softmax.log_total.astype(np.float32))[:, None]
        divergence[part] = np.einsum("ij,ij->i", weights, base)
        same[part] = softmax.top == rows[part, 4 : 4 + q.shape[1]].argmax(axis=1)
    return Positions(surprise, base_surprise, divergence, same)


def unpack(rows: Words, vocabulary: int) -> Logits:
    """Log-probabilities of some rows, shape (positions, vocabulary)."""
    head = np.ascontiguousarray(rows[:, :4]).view("<f4")  # (positions, 2)
    found = rows[:, 4 : 4 + vocabulary].astype(np.float32)
    found *= head[:, :1]
    found += head[:, 1:]
    return found
