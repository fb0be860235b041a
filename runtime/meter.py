"""Measures many variants of one model against it: each is written, read by the real kernels, and gone again.

The reference reads the text once; its log-probabilities lie in a file meanwhile, 16 bits each as in llama.cpp's files,
which leaves a mean over some hundred positions within 1e-5 nats.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gguforge.quant.plan import Plan
from gguforge.quant.provenance import Measurement
from gguforge.quant.writer import write
from gguforge.runtime.evaluate import Evaluation, evaluate
from gguforge.runtime.measured import measurement


class Meter:
    """Mean KL divergence of variants from a reference, on the same chunks of a text.

    Args:
        reference: the GGUF file.
        text: the text, or conversations in a .jsonl file.
        context: tokens of a chunk.
        chunks: how many to read at most; None for all.
        skip: chunks of the text to leave out before them.
        threads: None for the physical cores.
        workers: processes that write variants; None for the writer's choice.
        scratch: folder for the files; the system's by default. It needs room for one variant and the log-probabilities.
    """

    def __init__(
        self,
        reference: Path,
        text: str | os.PathLike[str],
        *,
        context: int,
        chunks: int | None,
        skip: int = 0,
        threads: int | None = None,
        workers: int | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self._reference, self._workers = reference, workers
        self._options: dict[str, Any] = {"context": context, "threads": threads}
        self._text: dict[str, Any] = {"text": text, "chunks": chunks, "skip": skip}
        self._folder = tempfile.TemporaryDirectory(prefix="gguforge-", dir=scratch)
        self._logits: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def divergence(self, plan: Plan) -> float:
        """Mean divergence of the model that a plan writes, nats.

        Raises:
            GGUForgeError: see `evaluate` and `write`.
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came.
        """
        return self.evaluation(plan).comparison.mean.value  # type: ignore[union-attr]  # there is a reference

    def measurement(self, plan: Plan) -> Measurement:
        """The divergence of the model that a plan writes, and on what it was measured."""
        found = self.evaluation(plan)
        return measurement(found, self._text["text"], self._reference, self._text["skip"])

    def evaluation(self, plan: Plan) -> Evaluation:
        """All figures of the model that a plan writes."""
        folder = Path(self._folder.name)
        if self._logits is None:
            evaluate(self._reference, save_base=folder / "reference.kld", **self._text, **self._options)
            self._logits = folder / "reference.kld"
        path = folder / "variant.gguf"
        write(plan, path, workers=self._workers, overwrite=True)
        return evaluate(path, None, against=self._logits, **self._options)
