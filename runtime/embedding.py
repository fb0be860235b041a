"""A text's embedding through llama.cpp, by the pooling that the file names; the mean where it names none.

Nothing is generated, and a text is read as a whole from an empty context. API: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.errors import EngineError
from gguforge.quant.reader import GGUFFile
from gguforge.runtime.library import LOG
from gguforge.runtime.loaded import Loaded, read_runnable
from gguforge.runtime.machine import physical_cores

FROM_FILE, MEAN = -1, 1  # llama_pooling_type


class Embedder(Loaded):
    """A loaded model that embeds texts.

    Attributes:
        width: numbers of an embedding.
    """

    def __init__(self, file: GGUFFile, context: int, threads: int) -> None:
        architecture = file.metadata["general.architecture"].value
        named = file.metadata.get(f"{architecture}.pooling_type")
        pooling = FROM_FILE if named is not None and named.value else MEAN
        size = {"n_batch": context, "n_ubatch": context}  # attention in both directions is one graph
        super().__init__(
            file.path, context=context, threads=threads, continues=False, **size, embeddings=True, pooling_type=pooling
        )
        self._size = context
        self.width = int(self._llama.llama_model_n_embd(self.model))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, context: int, threads: int | None = None) -> Self:
        """Check the file, see that it fits the memory, load it.

        Args:
            path: a GGUF file; of a split model, the first part.
            context: tokens of the longest text, special ones included.
            threads: None for the physical cores.

        Raises:
            GGUFError: the file is damaged.
            EngineError: llama.cpp cannot run it, or it does not fit.
            OSError: it cannot be read.
        """
        file, _ = read_runnable(path, context, continues=False)
        return cls(file, context, threads or physical_cores())

    def embed(self, text: str) -> NDArray[np.float32]:
        """The embedding of a text, of length 1, shape (width,). What is longer than the context is cut off.

        Raises:
            EngineError: llama.cpp failed.
        """
        tokens = self._tokens(text.encode("utf-8", "replace"))
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        memory = self._llama.llama_get_memory(self._context)
        if memory:  # encoders have none
            self._llama.llama_memory_clear(memory, True)
        code = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(pointer, len(tokens)))
        found = None if code else self._llama.llama_get_embeddings_seq(self._context, 0)
        if not found:
            raise EngineError(f"llama.cpp failed to embed (code {code}): {LOG.reason()}", path=self._path)
        states = np.ctypeslib.as_array(found, (self.width,)).copy()
        return np.asarray(states / max(float(np.linalg.norm(states)), 1e-12), np.float32)

    def _tokens(self, text: bytes) -> NDArray[np.int32]:
        """As the model was trained to read texts; nothing in it acts as a control token."""
        vocabulary = self._llama.llama_model_get_vocab(self.model)
        tokens = np.empty(len(text) + 16, np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = self._llama.llama_tokenize(vocabulary, text, len(text), pointer, len(tokens), True, False)
        if count <= self._size:
            return tokens[:count]
        return np.concatenate([tokens[: self._size - 1], tokens[count - 1 : count]])  # what ends a text stays
