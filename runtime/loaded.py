"""What holds memory of llama.cpp: a model and its context, opened by one way and freed once."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gguforge.quant.errors import EngineError
from gguforge.quant.reader import GGUFFile
from gguforge.quant.splits import read_model
from gguforge.runtime.checks import check_continues, check_runnable
from gguforge.runtime.fit import choose_context
from gguforge.runtime.library import LOG, library, load_model, new_context
from gguforge.runtime.machine import available_memory


class Closing(ABC):
    """Is closed at the end of a `with` block."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; a second call does nothing."""

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close it should the block fail: around what is done to it before its user has it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Loaded(Closing):
    """A model with a context.

    Args:
        path: a GGUF file that was found sound.
        context: tokens.
        threads: that compute.
        continues: refuse encoders.
        fields: of llama_context_params, besides those that `new_context` sets.

    Attributes:
        model: llama.cpp's model.

    Raises:
        EngineError: llama.cpp does not take it, or cannot make the context.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, context: int, threads: int, continues: bool = True, **fields: Any
    ) -> None:
        self._llama, self._path = library(), Path(path)
        model = load_model(self._path)
        try:
            if continues:
                _check_decodes(self._llama, model, self._path)
            self._context: Any = new_context(model, self._path, context=context, threads=threads, **fields)
        except BaseException:
            self._llama.llama_model_free(model)
            raise
        self.model: Any = model

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        if self.model:
            self._llama.llama_free(self._context)
            self._llama.llama_model_free(self.model)
        self.model = self._context = None

    def _failure(self, code: int) -> EngineError:
        """What to raise when llama_decode returned `code`."""
        reason = LOG.reason() or "no reason given"
        return EngineError(f"llama.cpp failed to evaluate (code {code}): {reason}", path=self._path)


def read_runnable(path: str | os.PathLike[str], context: int | None, *, continues: bool = True) -> tuple[GGUFFile, int]:
    """A file's header, checked, and the tokens of context that memory has room for.

    Args:
        path: a GGUF file; of a split model, the first part.
        context: how many are asked for; None for what the model was trained for: see `choose_context`.
        continues: refuse encoders.

    Raises:
        GGUFError: the file is damaged.
        EngineError: llama.cpp cannot run it, or it does not fit.
        OSError: it cannot be read.
    """
    file = read_model(path)
    check_runnable(file)
    if continues:
        check_continues(file)
    return file, choose_context(file, context, available_memory())


def _check_decodes(llama: Any, model: Any, path: Path) -> None:
    if llama.llama_model_has_encoder(model) or not llama.llama_model_has_decoder(model):
        raise EngineError("is not a model that continues text (an encoder)", path=path)
