"""Quantizes a model block by block with error feedback, so that it says what the unquantized model says.

Each block is run twice on the calibration text, with its own weights on the unquantized model's hidden states, and as
far as it is quantized on those of the quantized model. Stage by stage (matrices that read the same input) the moments
of the inputs are collected, the weights corrected for what is already lost (W' = W + E[(wanted - present) x^T]
E[x x^T]^-1) and then encoded with error feedback. Only one block is in memory; hidden states lie in mapped files.

Whether blocks can be run alone is measured on the first chunk: where a block alone does not give what it gives in the
whole model, the whole model is run instead, up to that block.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from gguforge.quant.blocks import block_type
from gguforge.quant.blocks.base import Bytes
from gguforge.quant.embedding import EMBEDDING
from gguforge.quant.errors import DataError, EngineError
from gguforge.quant.feedback import corrected, damped, encode_with_feedback, with_importance
from gguforge.quant.following import fingerprint
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import UNQUANTIZED
from gguforge.quant.quality import RefinedSource, refine_plan
from gguforge.quant.roles import layer
from gguforge.quant.writer import write
from gguforge.runtime.blocks import BlockRunner, States, block_count, block_plan
from gguforge.runtime.forward import Tokens
from gguforge.runtime.interrupt import deferred_signals
from gguforge.runtime.machine import physical_cores
from gguforge.runtime.moments import Inputs, StageMoments, collect
from gguforge.runtime.probe import HEAD, Stage
from gguforge.runtime.workbench import SIDES, Workbench

ALIKE = 1e-3
"""A block alone may differ by this much of its largest output: other kernels may add in another order."""

Progress = Callable[[int, int], None]


def tune(
    plan: Plan,
    chunks: Tokens,
    folder: str | os.PathLike[str],
    *,
    sequential: bool = True,
    guided: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Encode the matrices of a model with error feedback.

    Args:
        plan: the quantized model, its sources the unquantized one.
        chunks: the calibration text, shape (chunks, tokens), at most 512 tokens each; the first token of each as the
            model wants it.
        folder: where encoded tensors and hidden states are kept until the plan is executed; see `Workbench`.
        sequential: collect among quantized neighbours and correct for them; otherwise each matrix by itself.
        guided: take from the plan how important columns are, and from the chunks alone how they go together: for
            chunks that are no real text.
        threads: of llama.cpp; None for the physical cores.
        progress: called with what is done and the whole, in chunks.

    Returns:
        The same plan with encoded tensors in the folder as sources; matrices that no graph showed as such (experts)
        are searched as by `refine_plan`.

    Raises:
        GGUForgeError: llama.cpp does not run the model, or its numbers are damaged.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; the folder keeps what was done.
    """
    settings = f"{fingerprint(plan)} {sequential} {guided} {chunks.shape}"
    work = hashlib.sha256(settings.encode() + chunks.tobytes()).hexdigest()
    tuner = _Tuner(plan, chunks, Workbench(Path(folder), work), sequential, guided, threads or physical_cores())
    tuner.run(progress or (lambda done, total: None))
    return replace(plan, tensors=tuple(tuner.present(tensor) for tensor in plan.tensors))


def unquantized(plan: Plan) -> Plan:
    """The model that a plan quantizes."""
    return replace(plan, tensors=tuple(replace(tensor, type=tensor.source.type) for tensor in plan.tensors))


class _Tuner:
    """One run."""

    def __init__(
        self, plan: Plan, chunks: Tokens, bench: Workbench, sequential: bool, guided: bool, threads: int
    ) -> None:
        self.plan, self.chunks, self.bench, self.threads = plan, chunks, bench, threads
        self.sequential, self.guided, self.whole, self.better = sequential, guided, False, refine_plan(plan)
        self.index = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
        self.origin = unquantized(plan)
        self.count, self.done = block_count(plan), 0

    def run(self, progress: Progress) -> None:
        """Every block that is not done yet."""
        with deferred_signals() as signals:

            def step(total: int) -> None:
                self.done += 1
                progress(self.done, total)
                signals.raise_if_came()

            self._encode_embedding()
            for number in range(self.bench.blocks_done, self.count):
                self._tune_block(number, step)
                signals.raise_if_came()

    def present(self, tensor: TensorPlan) -> TensorPlan:
        """A tensor as it will stand in the quantized model, encoded already or not."""
        index = self.index[tensor.name]
        return self.bench.encoded(index, tensor) or self.better.tensors[index]

    def _tensor(self, name: str) -> TensorPlan | None:
        """The tensor of that name, if it is to be encoded in blocks; graphs also know views, which are no tensors."""
        if name not in self.index:
            return None
        tensor = self.plan.tensors[self.index[name]]
        return None if tensor.is_copy or tensor.type in UNQUANTIZED else tensor

    def _encode_embedding(self) -> None:
        """Before all else, once for all: every block's inputs follow from it."""
        for tensor in self.better.tensors:
            index = self.index[tensor.name]
            wanted = tensor.name == EMBEDDING and isinstance(tensor.source, RefinedSource)
            if wanted and self.bench.encoded(index, tensor) is None:
                self._save(tensor, tensor.source.raw_rows(0, tensor.rows))

    def _tune_block(self, number: int, step: Callable[[int], None]) -> None:
        with ExitStack() as stack:
            exact = stack.enter_context(self._exact_block(number))
            stages = exact.survey(self._inputs(number, SIDES[0], 0))
            total = self.count * (len(stages) + 1) * len(self.chunks)
            self.done = max(self.done, number * (len(stages) + 1) * len(self.chunks))
            waiting = {self._real(name, number) for stage in stages for name in stage.names}
            for stage in stages:
                names = [self._real(name, number) for name in stage.names]
                tensors = [t for t in map(self._tensor, names) if t is not None]
                waiting -= set(names) - {t.name for t in tensors}
                if any(self.bench.encoded(self.index[t.name], t) is None for t in tensors):
                    moments = self._collect(number, stage, exact, waiting, lambda: step(total))
                    for name, tensor in zip(names, map(self._tensor, names), strict=True):
                        if tensor is not None:
                            self._encode(tensor, moments, stage.names[names.index(name)])
                waiting -= set(names)
            if not self.whole and number + 1 < self.count:
                self._pass_on(number, exact, lambda: step(total))
        self.bench.finish_block()

    def _real(self, name: str, number: int) -> str:
        """The name in the model of a tensor of the file that is run."""
        return name if self.whole else name.replace("blk.0.", f"blk.{number}.", 1)

    def _collect(
        self, number: int, stage: Stage, exact: BlockRunner, waiting: set[str], after_chunk: Callable[[], None]
    ) -> StageMoments:
        if not self.sequential:
            return collect(stage, self._pairs(number), exact, None, after_chunk)
        with self._present_block(number, waiting) as present:
            return collect(stage, self._pairs(number), exact, present, after_chunk)

    def _encode(self, tensor: TensorPlan, moments: StageMoments, name: str) -> None:
        weights = tensor.source.rows(0, tensor.rows)
        if not np.isfinite(weights).all():
            raise DataError("holds NaN or infinity", tensor=tensor.name)
        known = tensor.importance if self.guided else None
        inputs = damped(moments.inputs if known is None else with_importance(moments.inputs, known[0]))
        shift = moments.shift(name, weights)
        if shift is not None:
            weights = corrected(weights, inputs, shift)
        self._save(tensor, encode_with_feedback(weights, inputs, tensor.type))

    def _save(self, tensor: TensorPlan, data: Bytes) -> None:
        if not block_type(tensor.type).is_finite(data):
            raise DataError(f"holds values too large for {tensor.type.name}", tensor=tensor.name)
        self.bench.save(self.index[tensor.name], data)

    def _inputs(self, number: int, side: str, chunk: int) -> Inputs:
        if self.whole or number == 0:
            tokens: Tokens = self.chunks[chunk]
            return tokens
        states: States = self.bench.states(number, side)[chunk]
        return states

    def _pairs(self, number: int) -> Iterator[tuple[Inputs, Inputs]]:
        ours = SIDES[self.sequential]
        for chunk in range(len(self.chunks)):
            yield self._inputs(number, SIDES[0], chunk), self._inputs(number, ours, chunk)

    def _runner(self, path: Path, number: int, whole: bool) -> BlockRunner:
        embedded = whole or number == 0
        width = 0 if embedded else self.bench.states(number, SIDES[0]).shape[-1]
        return BlockRunner(
            path, layer=number if whole else 0, head=number == self.count - 1,
            chunk=self.chunks.shape[1], width=width, threads=self.threads,
        )  # fmt: skip

    def _written(self, plan: Plan, name: str) -> Path:
        path = self.bench.path / f"{name}.gguf"
        write(plan, path, workers=1, overwrite=True)
        return path

    def _exact_block(self, number: int) -> BlockRunner:
        """The block with its own weights; alone, if that gives what it gives in the whole model."""
        whole = self._runner(self._whole_file(), number, whole=True)
        if self.whole:
            return whole
        with whole:
            wanted = whole.run(self.chunks[0], output=True).output
        try:
            alone = self._runner(self._written(block_plan(self.origin, number), "exact"), number, whole=False)
        except EngineError:
            return self._all_at_once(number)
        try:
            found = alone.run(self._inputs(number, SIDES[0], 0), output=True).output
        except BaseException:
            alone.close()
            raise
        assert found is not None
        assert wanted is not None
        if np.abs(found - wanted).max() <= ALIKE * np.abs(wanted).max():
            return alone
        alone.close()
        return self._all_at_once(number)

    def _all_at_once(self, number: int) -> BlockRunner:
        """From this block on, the whole model is run."""
        self.whole = True
        return self._runner(self._whole_file(), number, whole=True)

    def _whole_file(self) -> Path:
        """The unquantized model: its own file, if it is one."""
        paths = {path for tensor in self.origin.tensors for path in tensor.source.paths}
        if len(paths) == 1:
            return Path(paths.pop())
        path = self.bench.path / "whole.gguf"
        return path if path.exists() else self._written(self.origin, "whole")

    def _present_block(self, number: int, waiting: set[str]) -> BlockRunner:
        """The block, or the model up to it, as far as it is quantized; matrices that wait have their own weights."""
        tensors = tuple(
            origin if tensor.name in waiting or layer(tensor.name) > number or tensor.name == HEAD
            else self.present(tensor)
            for tensor, origin in zip(self.plan.tensors, self.origin.tensors, strict=True)
        )  # fmt: skip
        plan = replace(self.plan, tensors=tensors)
        path = self._written(plan if self.whole else block_plan(plan, number), "present")
        return self._runner(path, number, self.whole)

    def _pass_on(self, number: int, exact: BlockRunner, after_chunk: Callable[[], None]) -> None:
        """Hidden states of the next block, for both sides."""
        with ExitStack() as stack:
            runners = {SIDES[0]: exact}
            if self.sequential:
                runners[SIDES[1]] = stack.enter_context(self._present_block(number, set()))
            first = exact.run(self._inputs(number, SIDES[0], 0), output=True).output
            assert first is not None
            shape = len(self.chunks), *first.shape
            files = {side: self.bench.new_states(number + 1, side, shape) for side in runners}
            for chunk in range(len(self.chunks)):
                for side, runner in runners.items():
                    files[side][1][chunk] = runner.run(self._inputs(number, side, chunk), output=True).output
                after_chunk()
            for side, (part, states) in files.items():
                states.flush()  # type: ignore[attr-defined]
                self.bench.keep_states(part, number + 1, side)
