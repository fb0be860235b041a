"""Reads text through a model, chunk by chunk, each from an empty context: what calibration and evaluation share.

A chunk is evaluated in batches of 512 tokens, and only the scores (logits) that were asked for are computed and kept,
those of one batch. Nothing is generated. API: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import InputError
from gguforge.quant.reader import GGUFFile
from gguforge.runtime.library import LOG
from gguforge.runtime.loaded import Loaded, read_runnable
from gguforge.runtime.machine import physical_cores

BATCH = 512  # tokens, llama.cpp's own choice for one graph
MAX_TEXT_BYTES = 1 << 30  # llama.cpp counts bytes and tokens in 32 bits

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


class Forward(Loaded):
    """A loaded model that reads chunks.

    Attributes:
        file: the file's header.
        chunk: tokens of a chunk.
        vocabulary_size: scores that one position has.
        bos: the token that every chunk begins with, None when the vocabulary wants none.
    """

    def __init__(self, file: GGUFFile, chunk: int, threads: int, **fields: Any) -> None:
        super().__init__(file.path, context=chunk, threads=threads, **fields)
        self.file, self.chunk = file, chunk
        llama = self._llama
        self._vocabulary = llama.llama_model_get_vocab(self.model)
        self.vocabulary_size = int(llama.llama_vocab_n_tokens(self._vocabulary))
        bos = int(llama.llama_vocab_bos(self._vocabulary))
        self.bos = bos if llama.llama_vocab_get_add_bos(self._vocabulary) and bos >= 0 else None
        self._interrupted = False
        self._batch = _Batch(llama, min(BATCH, chunk))
        self._abort = llama.ggml_abort_callback(lambda _: self._interrupted)
        llama.llama_set_abort_callback(self._context, self._abort, None)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        chunk: int,
        outputs: int,
        threads: int | None = None,
        callback: Any = None,
        verbose: bool = False,
    ) -> Self:
        """Check the file, see that it fits the memory, load it.

        Args:
            path: a GGUF file; of a split model, the first part.
            chunk: tokens of a chunk.
            outputs: positions of one batch whose scores are wanted, at most.
            threads: None for the physical cores.
            callback: llama.cpp's evaluation callback (a ctypes function), looks into every graph.
            verbose: pass llama.cpp's log to stderr.

        Raises:
            GGUFError: the file is damaged.
            EngineError: llama.cpp cannot run it, or it does not fit.
            OSError: it cannot be read.
        """
        LOG.verbose = verbose
        file, _ = read_runnable(path, chunk)
        size = min(BATCH, chunk)
        fields = {"n_batch": size, "n_ubatch": size, "n_outputs_max": min(outputs, size), "n_outputs_max_per_seq": 0}
        if callback is not None:
            fields["cb_eval"] = callback
        return cls(file, chunk, threads or physical_cores(), **fields)

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._batch.close()
        super().close()

    def interrupt(self) -> None:
        """Stop in the middle of a batch, for good; safe in a signal handler and from another thread."""
        self._interrupted = True

    def tokenize(self, text: bytes) -> Tokens:
        """A text's tokens, with the token that begins texts; nothing in it acts as a control token.

        Raises:
            InputError: it is too long.
        """
        if len(text) > MAX_TEXT_BYTES:
            raise InputError(
                "the text is too long", expected=f"at most {MAX_TEXT_BYTES} bytes", found=f"{len(text)} bytes"
            )
        room = len(text) + 16
        while True:
            tokens = np.empty(room, np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = self._llama.llama_tokenize(self._vocabulary, text, len(text), pointer, room, True, False)
            if count >= 0:
                break
            room = -count
        ends = self._llama.llama_vocab_get_add_eos(self._vocabulary)
        return tokens[: count - 1 if ends and count else count].copy()

    def detokenize(self, tokens: Tokens) -> str:
        """The text of tokens, without control tokens; wrong bytes become U+FFFD."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        room = 8 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            size = self._llama.llama_detokenize(self._vocabulary, pointer, len(tokens), buffer, room, True, False)
            if size >= 0:
                return buffer.raw[:size].decode("utf-8", "replace")
            room = -size

    def read(self, tokens: Tokens, first: int, last: int) -> Iterator[tuple[int, Logits]]:
        """As `read_where`, for the positions `first:last`; yields the first of a batch's positions and their scores."""
        wanted = np.zeros(len(tokens), np.bool_)
        wanted[first:last] = True
        for positions, scores in self.read_where(tokens, wanted):
            yield int(positions[0]), scores

    def read_where(self, tokens: Tokens, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Logits]]:
        """Evaluate one chunk from an empty context and yield the scores batch by batch.

        It ends early after `interrupt`.

        Args:
            tokens: at most `chunk` of them; the first is replaced by `bos`.
            wanted: at which positions scores are wanted, shape (tokens,).

        Yields:
            Positions, and their scores, shape (positions, vocabulary size); they are overwritten by the next batch.

        Raises:
            EngineError: llama.cpp failed.
        """
        assert 0 < len(tokens) <= self.chunk
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for start in range(0, len(tokens), self._batch.size):
            part = tokens[start : start + self._batch.size].copy()
            if start == 0 and self.bos is not None:
                part[0] = self.bos
            flags = wanted[start : start + len(part)]
            code = self._llama.llama_decode(self._context, self._batch.filled(part, start, flags))
            if code == 2 or self._interrupted:
                return
            if code:
                raise self._failure(code)
            positions = np.flatnonzero(flags)
            if len(positions):
                yield start + positions, self._logits(len(positions))

    def _logits(self, positions: int) -> Logits:
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (positions, self.vocabulary_size))


class _Batch:
    """llama.cpp's batch, filled through NumPy."""

    def __init__(self, llama: Any, size: int) -> None:
        self._llama, self.size = llama, size
        self._batch = batch = llama.llama_batch_init(size, 0, 1)
        self._open = True
        self._tokens, self._positions, self._wanted = (
            np.ctypeslib.as_array(pointer, (size,)) for pointer in (batch.token, batch.pos, batch.logits)
        )
        for i in range(size):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

    def filled(self, tokens: Tokens, start: int, wanted: NDArray[np.bool_]) -> Any:
        """The batch with these tokens at positions from `start` on; scores are wanted where `wanted` says so."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(start, start + count)
        self._wanted[:count] = wanted
        return self._batch

    def close(self) -> None:
        if self._open:
            self._llama.llama_batch_free(self._batch)
        self._open = False
