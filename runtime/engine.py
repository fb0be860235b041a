"""The loop over llama.cpp: one model, one context, tokens in, tokens out.

What the context already holds is kept: only tokens that differ from it are evaluated. It knows nothing of text or
turns. API: llama.cpp, include/llama.h.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gguforge.quant.constants import LlamaFileType
from gguforge.quant.errors import EngineError
from gguforge.quant.reader import GGUFFile
from gguforge.runtime.fit import positions
from gguforge.runtime.library import LOG
from gguforge.runtime.loaded import Loaded, read_runnable
from gguforge.runtime.machine import physical_cores
from gguforge.runtime.sampling import Sampler
from gguforge.runtime.vocabulary import Vocabulary


@dataclass
class Stats:
    """What one answer took.

    Attributes:
        prompt_tokens: tokens before the answer, kept ones included.
        evaluated_tokens: those of them that had to be evaluated.
        generated_tokens: tokens of the answer.
        first_token_seconds: from the question to the first token (TTFT).
        generation_seconds: from the first token to the last.
        stop: "end", "length", "interrupted" or "context"; empty while running.
    """

    prompt_tokens: int = 0
    evaluated_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float = 0.0
    generation_seconds: float = 0.0
    stop: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation; the first token belongs to the prompt and is not counted."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


class Engine(Loaded):
    """A loaded model with a context.

    Attributes:
        file: the file's header.
        vocabulary: its tokenizer.
        context: tokens that fit.
        threads: threads that compute.

    Example:
        with Engine.open("model.gguf") as engine:
            session = ChatSession(engine)
            for piece in session.ask("Hello"):
                print(piece, end="", flush=True)
    """

    def __init__(self, file: GGUFFile, context: int, threads: int) -> None:
        super().__init__(file.path, context=context, threads=threads)
        with self.closed_on_error():
            if self._llama.llama_model_is_diffusion(self.model):
                raise EngineError("is not a model that continues text (a diffusion model)", path=file.path)
            self.vocabulary = Vocabulary(self.model)
        self._memory = self._llama.llama_get_memory(self._context)
        self.file = file
        self.threads = threads
        size = int(self._llama.llama_n_ctx(self._context))  # rounded up by llama.cpp
        self.context = min(size, positions(file) or size)
        self._held: list[int] = []  # tokens whose keys and values the context holds
        self._interrupted = False
        self._one = (ctypes.c_int32 * 1)()
        self._abort = self._llama.ggml_abort_callback(lambda _: self._interrupted)
        self._no_abort = self._llama.ggml_abort_callback()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        context: int | None = None,
        threads: int | None = None,
        verbose: bool = False,
    ) -> Self:
        """Check the file, see that it fits the memory, load it.

        Args:
            path: a GGUF file; of a split model, the first part.
            context: tokens; None for the training length, at most 8192, as far as memory allows.
            threads: None for the physical cores.
            verbose: pass llama.cpp's log to stderr.

        Raises:
            GGUFError: the file is damaged.
            EngineError: llama.cpp cannot run it, or it does not fit.
            OSError: it cannot be read.
        """
        LOG.verbose = verbose
        file, tokens = read_runnable(path, context)
        return cls(file, tokens, threads or physical_cores())

    def interrupt(self) -> None:
        """Stop what is evaluated or generated until `resume`; safe in a signal handler and from another thread."""
        self._interrupted = True

    def resume(self) -> None:
        """Forget an earlier `interrupt`."""
        self._interrupted = False

    @property
    def trained_context(self) -> int:
        """Tokens of context that the model was trained for."""
        return int(self._llama.llama_model_n_ctx_train(self.model))

    @property
    def tokens_held(self) -> int:
        """Tokens whose keys and values the context holds."""
        return len(self._held)

    def describe(self) -> str:
        """The model in a few words: architecture, parameters, type: `llama 1.2B Q4_K_M`."""
        architecture = self.file.metadata["general.architecture"].value
        parameters = sum(tensor.elements for tensor in self.file.tensors)
        return f"{architecture} {_rounded(parameters)} {type_name(self.file)}"

    def sampler(self, settings: Any) -> Sampler:
        """A sampler for this vocabulary."""
        return Sampler(settings, self.vocabulary.size)

    def generate(
        self, prompt: Sequence[int], sampler: Sampler, stats: Stats, limit: int | None = None
    ) -> Generator[int, None, None]:
        """Yield what follows `prompt`, until an end token (not yielded), the limit, a full context, or `interrupt`.

        Args:
            prompt: all tokens from the beginning of the context; what the context holds already is not evaluated again.
            sampler: draws the tokens.
            stats: is added to as it goes; `stats.stop` says why it ended.
            limit: most tokens that `stats` may count as generated.

        Raises:
            EngineError: llama.cpp failed.
        """
        assert 0 < len(prompt) <= self.context
        started = time.perf_counter()
        kept = self._keep_prefix(prompt)
        stats.prompt_tokens = stats.prompt_tokens or len(prompt)
        finished = self._evaluate(prompt[kept:])
        stats.evaluated_tokens += len(self._held) - kept
        if not finished:
            stats.stop = "interrupted"
            return
        sampler.remember(list(prompt[kept:]))
        yield from self._continue(sampler, stats, limit, started)

    def _continue(
        self, sampler: Sampler, stats: Stats, limit: int | None, started: float
    ) -> Generator[int, None, None]:
        sample, ends = self._llama.llama_sampler_sample, self.vocabulary.ends
        first = None
        try:
            while True:
                token = sample(sampler.chain, self._context, -1)
                if first is None:
                    first = time.perf_counter()
                    stats.first_token_seconds = stats.first_token_seconds or first - started
                if ends(token):
                    stats.stop = "end"
                    return
                stats.generated_tokens += 1
                yield token
                stats.stop = self._reason_to_stop(stats.generated_tokens, limit)
                if stats.stop:
                    return
                self._decode_one(token)
        finally:
            if first is not None:
                stats.generation_seconds += time.perf_counter() - first

    def _reason_to_stop(self, generated: int, limit: int | None) -> str:
        if self._interrupted:
            return "interrupted"
        if generated == limit:
            return "length"
        return "context" if len(self._held) == self.context else ""

    def _keep_prefix(self, prompt: Sequence[int]) -> int:
        """Cut the context back to what it shares with the prompt; at least one token stays to be evaluated."""
        shared = 0
        for ours, theirs in zip(self._held, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if shared < len(self._held) and not self._llama.llama_memory_seq_rm(self._memory, 0, shared, -1):
            self._llama.llama_memory_clear(self._memory, True)  # recurrent states cannot be cut in the middle
            shared = 0
        del self._held[shared:]
        return shared

    def _evaluate(self, tokens: Sequence[int]) -> bool:
        """Take in tokens batch by batch; False when `interrupt` came, with the finished part kept."""
        step = int(self._llama.llama_n_batch(self._context))
        self._llama.llama_set_abort_callback(self._context, self._abort, None)
        try:
            for start in range(0, len(tokens), step):
                part = list(tokens[start : start + step])
                tokens_in_c = (ctypes.c_int32 * len(part))(*part)  # must outlive the call below
                batch = self._llama.llama_batch_get_one(tokens_in_c, len(part))
                code = self._llama.llama_decode(self._context, batch)
                if code == 2 or self._interrupted:
                    self._hold_what_is_there(part)
                    return False
                self._check(code)
                self._held += part
            return True
        finally:
            self._llama.llama_set_abort_callback(self._context, self._no_abort, None)

    def _hold_what_is_there(self, part: list[int]) -> None:
        """After an abort the context may hold a part of the batch: believe the context, and drop the rest."""
        there = int(self._llama.llama_memory_seq_pos_max(self._memory, 0)) + 1
        self._held += part[: max(0, there - len(self._held))]
        del self._held[there:]

    def _decode_one(self, token: int) -> None:
        self._one[0] = token
        self._check(self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(self._one, 1)))
        self._held.append(token)

    def _check(self, code: int) -> None:
        if code:
            self._held.clear()
            self._llama.llama_memory_clear(self._memory, True)
            raise self._failure(code)


def _rounded(count: int) -> str:
    """1234567 -> 1.2M."""
    for letter, unit in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def type_name(file: GGUFFile) -> str:
    """The preset that the file names, or the block type that holds most of its bytes."""
    entry = file.metadata.get("general.file_type")
    if entry is not None and isinstance(entry.value, int) and entry.value in set(LlamaFileType):
        return str(LlamaFileType(entry.value).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes: dict[str, int] = {}
    for tensor in file.tensors:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default="")
