"""Measures a model on a text: its perplexity, and how far its predictions are from a reference's.

Both models read each chunk side by side, and only a few numbers a position are kept. The same chunks and positions as
llama-perplexity: the second half of each chunk is scored, each token from all before it in its chunk. Method:
llama.cpp, tools/perplexity/README.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import InputError
from gguforge.runtime.chunks import Text, read_text
from gguforge.runtime.divergence import Comparison, Estimate, Positions, compare, measure, perplexity, summarize
from gguforge.runtime.forward import BATCH, Forward, Logits, Tokens
from gguforge.runtime.interrupt import deferred_signals
from gguforge.runtime.logit_files import (
    LogitFile,
    compare_packed,
    is_logit_file,
    pack,
    read_logit_file,
    scored,
    writing_logit_file,
)
from gguforge.runtime.overlap import shared

DEFAULT_CHUNK = 512  # tokens, as llama-perplexity
SMALLEST_CHUNK = 4  # tokens; fewer leave nothing to score

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        chunks: chunks that were read.
        context: tokens of a chunk.
        positions: tokens that were scored.
        text_sha256: of the text file, hexadecimal; empty when the tokens came from a file of log-probabilities.
        perplexity: the model's.
        comparison: against the reference; None when there was none.
        overlap: share of the text's passages that the calibration text holds as well; None where that is not known.
        by_position: mean divergence at each position that is scored in a chunk, shape (positions a chunk,); empty
            without a reference.
    """

    chunks: int
    context: int
    positions: int
    text_sha256: str
    perplexity: Estimate
    comparison: Comparison | None
    overlap: float | None
    by_position: NDArray[np.float64]


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str] | None,
    *,
    against: str | os.PathLike[str] | None = None,
    save_base: str | os.PathLike[str] | None = None,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    skip: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    calibration: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> Evaluation:
    """Read a text and measure.

    Args:
        model: a GGUF file.
        text: plain text, or conversations in a .jsonl file; None when `against` brings the tokens.
        against: the reference: a GGUF file, or a file of its log-probabilities.
        save_base: write the model's log-probabilities into this file, to be compared against later.
        context: tokens of a chunk; that of the file when `against` is one.
        chunks: how many to read at most.
        skip: chunks of the text to leave out before them.
        threads: None for the physical cores.
        overwrite: replace an existing `save_base`.
        calibration: fingerprint of the text that the model was calibrated with.
        progress: called with the chunks that are done, their number, and the perplexity so far.

    Raises:
        GGUForgeError: an input is damaged or too short, the models have different vocabularies, llama.cpp fails.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came.
    """
    file = read_logit_file(against) if against is not None and is_logit_file(against) else None
    context = context if file is None else file.chunks.shape[1]
    if context < SMALLEST_CHUNK:
        raise InputError("a chunk is too short", expected=f"at least {SMALLEST_CHUNK} tokens", found=context)
    with ExitStack() as stack:

        def opened(path: str | os.PathLike[str]) -> Forward:
            outputs = min(BATCH, scored(context))
            return stack.enter_context(Forward.open(path, chunk=context, outputs=outputs, threads=threads))

        ours = opened(model)
        read = _text(ours, text, file, chunks, skip)
        theirs: Forward | LogitFile | None = file
        if against is not None and file is None:
            theirs = opened(against)
            _check_same_tokens(ours, theirs, read, text, skip)
        output = None
        if save_base is not None:
            output = stack.enter_context(writing_logit_file(save_base, read.chunks, ours.vocabulary_size, overwrite))
        positions = _measure(ours, theirs, read.chunks, output, progress or (lambda done, total, value: None))
        overlap = shared(read.fingerprint(ours), calibration) if calibration else None
    return Evaluation(
        len(read.chunks), context, len(positions.surprise), read.sha256, perplexity(positions.surprise),
        None if theirs is None else summarize(positions), overlap,
        np.mean(positions.divergence.reshape(len(read.chunks), -1), axis=0),
    )  # fmt: skip


def _text(
    model: Forward, path: str | os.PathLike[str] | None, file: LogitFile | None, limit: int | None, skip: int
) -> Text:
    """The text that was given, or that of the reference's file; when both are there they must be the same."""
    if file is None:
        if path is None:
            raise InputError("no text was given", remedy="Pass one with -f TEXT.")
        return read_text(model, path, limit, skip)
    if model.vocabulary_size != file.vocabulary:
        raise InputError(
            "has another vocabulary than the model", path=file.path, expected=f"{model.vocabulary_size} tokens",
            found=file.vocabulary,
        )  # fmt: skip
    chunks = file.chunks[:limit]
    if path is None:
        return Text(os.fspath(file.path), "", chunks)
    read = read_text(model, path, len(chunks))
    if not np.array_equal(read.chunks, chunks):
        raise InputError("was made from another text", path=file.path, remedy="Leave -f out: the file brings its own.")
    return read


def _check_same_tokens(
    ours: Forward, theirs: Forward, read: Text, path: str | os.PathLike[str] | None, skip: int
) -> None:
    """Predictions can be compared only where both models have the same tokens before them."""
    assert path is not None
    same = ours.vocabulary_size == theirs.vocabulary_size
    if not same or not np.array_equal(read.chunks, read_text(theirs, path, len(read.chunks), skip).chunks):
        raise InputError(
            "cuts the text into other tokens than the model", path=theirs.file.path,
            remedy="Compare with a model that has the same tokenizer.",
        )  # fmt: skip


def _measure(
    ours: Forward, theirs: Forward | LogitFile | None, chunks: Tokens, output: BinaryIO | None, progress: Progress
) -> Positions:
    """Every chunk's positions, one behind the other."""
    parts: list[Positions] = []
    total = 0.0

    def stop() -> None:
        ours.interrupt()
        if isinstance(theirs, Forward):
            theirs.interrupt()

    with deferred_signals(stop) as signals:
        for number, chunk in enumerate(chunks):
            for found, logits in _chunk(ours, theirs, number, chunk):
                parts.append(found)
                total += float(found.surprise.sum())
                if output is not None:
                    output.write(pack(logits).tobytes())
            signals.raise_if_came()
            done = number + 1
            progress(done, len(chunks), math.exp(total / (done * scored(len(chunk)))))
    return Positions.joined(parts)


def _chunk(
    ours: Forward, theirs: Forward | LogitFile | None, number: int, chunk: Tokens
) -> Iterator[tuple[Positions, Logits]]:
    """One chunk's positions, batch by batch, with the model's scores there."""
    first, last = len(chunk) // 2, len(chunk) - 1
    others = theirs.read(chunk, first, last) if isinstance(theirs, Forward) else None
    for start, logits in ours.read(chunk, first, last):
        targets = chunk[start + 1 : start + 1 + len(logits)]
        if others is not None:
            pair = next(others, None)
            if pair is None:  # interrupted
                return
            yield compare(logits, pair[1], targets), logits
        elif isinstance(theirs, LogitFile):
            rows = theirs.rows(number)[start - first : start - first + len(logits)]
            yield compare_packed(logits, rows, targets), logits
        else:
            yield measure(logits, targets), logits
