"""A GGUF file as a teacher: llama.cpp reads each document, and every batch's scores are reduced before the next.

Scores are computed at the positions that are wanted and nowhere else, and a document is read no further than the last
of them. Memory: the weights, the cache of one document, and the scores of one batch of 512 tokens.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.sampling import Doubles, Reducer
from gguforge.distill.shards import KINDS, Ids, Rows
from gguforge.distill.targets import TeacherRecord
from gguforge.distill.teachers.base import Teacher
from gguforge.distill.tokens import Tokenizer
from gguforge.quant.errors import EngineError
from gguforge.runtime.calibrate import model_identity
from gguforge.runtime.engine import type_name
from gguforge.runtime.forward import BATCH, Forward
from gguforge.runtime.library import library
from gguforge.runtime.machine import physical_cores


class GGUFTeacher(Teacher):
    """llama.cpp with one context."""

    kinds = KINDS

    def __init__(self, forward: Forward, threads: int) -> None:
        self._forward, self.threads = forward, threads
        file = forward.file
        self.tokenizer = Tokenizer(forward.model, file.metadata)
        self.vocabulary = forward.vocabulary_size
        engine = f"llama-cpp-python {version('llama-cpp-python')}"
        self.record = TeacherRecord(file.path.name, type_name(file), engine, model_identity(file), 1.0)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, context: int, threads: int | None = None) -> Self:
        """Load a file for documents of at most `context` tokens.

        Raises:
            EngineError: the model was trained for shorter ones; and as `Forward.open`.
        """
        threads = threads or physical_cores()
        forward = Forward.open(path, chunk=context, outputs=BATCH, threads=threads)
        trained = int(library().llama_model_n_ctx_train(forward.model))
        if 0 < trained < context:
            forward.close()
            raise EngineError(
                "was trained for shorter contexts", path=path, expected=f"at most {trained} tokens", found=context,
                remedy=f"Pass --context {trained}.",
            )  # fmt: skip
        return cls(forward, threads)

    def rows(self, input_ids: Ids, positions: NDArray[np.int64], reduce: Reducer, at: Doubles) -> Rows | None:
        read = input_ids[: positions[-1] + 1]
        wanted = np.zeros(len(read), np.bool_)
        wanted[positions] = True
        next_ids = input_ids[positions + 1]
        parts, done = [], 0
        for where, scores in self._forward.read_where(read, wanted):
            part = slice(done, done + len(where))
            parts.append(reduce(scores, next_ids[part], at[part]))
            done = part.stop
        return Rows.joined(parts) if done == len(positions) else None

    def interrupt(self) -> None:
        self._forward.interrupt()

    def close(self) -> None:
        self.tokenizer.close()
        self._forward.close()
