"""Chooses every tensor's type so that the file has a given size and the divergence is least, and proves it.

How much a tensor matters is measured (`gguforge.runtime.sensitivity`), what a type costs it is computed on its rows
(`gguforge.quant.damage`); their product is the damage that `gguforge.quant.allocate` minimises. Then the file is
measured on text that had no part in the choice, against plain presets that fit; if one is better, that one is taken.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gguforge.quant.allocate import Option, allocate
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.damage import relative_errors
from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan, TensorPlan, padded, row_bytes
from gguforge.quant.presets import PRESETS, UNQUANTIZED, Preset
from gguforge.quant.provenance import Measurement, named_hash
from gguforge.quant.quantize import Guide, plan_of_file, retype
from gguforge.quant.rules import Overrides
from gguforge.quant.splits import read_model
from gguforge.runtime.evaluate import evaluate
from gguforge.runtime.memory import buffers
from gguforge.runtime.meter import Meter
from gguforge.runtime.sensitivity import sensitivities

MENU = (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0, T.IQ4_XS, T.IQ4_NL, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)
GUIDED_MENU = (*MENU, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S)
"""With an importance matrix there are also the types that need one; they are slower to run on a CPU."""
COARSE = T.Q2_K  # rows that it does not divide fall back to Q4_0
RIVALS = 4  # presets that the choice is measured against
FLOOR = 1e-7  # nats; a smaller divergence is noise

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Rival:
    """A plan, and how the model that it writes was measured on the text for verification.

    Attributes:
        name: a preset, or "chosen".
        plan: the plan.
        measured: what was found.
    """

    name: str
    plan: Plan
    measured: Measurement

    @property
    def divergence(self) -> float:
        """Mean KL divergence, nats."""
        return self.measured.kld


@dataclass(frozen=True, eq=False)
class Sized:
    """What came of it.

    Attributes:
        best: what to write; "chosen", unless a preset was better.
        chosen: the types that were chosen for the size.
        rivals: the presets that fit, as measured, best first.
        everything: whether each tensor has its largest type, since all fit; then no preset was measured.
    """

    best: Rival
    chosen: Rival
    rivals: tuple[Rival, ...]
    everything: bool = False


@dataclass(frozen=True)
class Measuring:
    """How to measure.

    Attributes:
        text: the text, or conversations in a .jsonl file; its first chunks choose, those behind them verify.
        context: tokens of a chunk.
        chunks: chunks for the choice, and as many for the verification.
        threads, workers: for llama.cpp and for the writer; None for their own choice.
        store: keeps the sweep's results.
        scratch: folder for the files of variants; the system's by default.
    """

    text: str | os.PathLike[str]
    context: int = 512
    chunks: int = 8
    threads: int | None = None
    workers: int | None = None
    store: Path = Path("sensitivity.json")
    scratch: str | os.PathLike[str] | None = None

    def meter(self, model: Path, verify: bool) -> Meter:
        """The text's chunks for the choice, or those for the verification."""
        return Meter(
            model, self.text, context=self.context, chunks=self.chunks, skip=self.chunks if verify else 0,
            threads=self.threads, workers=self.workers, scratch=self.scratch,
        )  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What choosing will take.

    Attributes:
        evaluations: models to write and read the text with.
        seconds: of the whole, from the time that one chunk takes.
        memory: bytes, of the weights and buffers of one model.
        disk: bytes in the scratch folder.
    """

    evaluations: int
    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True, eq=False)
class Scope:
    """What there is to choose.

    Attributes:
        base: the unquantized model.
        coarse: every tensor in the coarse type.
        sizes: for each tensor that is chosen its bytes, padding included, in every type that it could have.
        budget: bytes for these tensors.
    """

    base: Plan
    coarse: Plan
    sizes: dict[str, dict[T, int]]
    budget: int

    @property
    def largest(self) -> dict[str, T] | None:
        """The largest type of each tensor, if all of them fit: then nothing need be measured to choose."""
        found = {name: max(some, key=lambda kind: some[kind]) for name, some in self.sizes.items()}
        return found if sum(self.sizes[name][kind] for name, kind in found.items()) <= self.budget else None


def _scope(model: str | os.PathLike[str], budget: int, guide: Guide | None) -> Scope:
    """Whether there is any choice is better known before the sweep.

    Raises:
        InputError: the budget is too small, or the model is quantized already.
    """
    base = plan_of_file(read_model(model))
    coarse = retype(base, COARSE.name, guide=guide, overrides=_types({tensor.name: COARSE for tensor in base.tensors}))
    chosen = [tensor for tensor in coarse.tensors if not tensor.is_copy and tensor.type not in UNQUANTIZED]
    menu = MENU if guide is None else GUIDED_MENU
    sizes = {tensor.name: _sizes(tensor, menu, coarse.alignment) for tensor in chosen}
    left = budget - coarse.size + sum(padded(tensor.nbytes, coarse.alignment) for tensor in chosen)
    allocate({name: [Option(kind, n, 0) for kind, n in some.items()] for name, some in sizes.items()}, left)
    return Scope(base, coarse, sizes, left)


def forecast(model: str | os.PathLike[str], budget: int, how: Measuring, guide: Guide | None = None) -> Forecast:
    """What `fit_size` will take on a model; one chunk of the text is read.

    Raises:
        InputError: see `fit_size`.
        GGUForgeError: see `evaluate`.
    """
    scope, file = _scope(model, budget, guide), read_model(model)
    start = time.perf_counter()
    evaluate(model, how.text, context=how.context, chunks=1, threads=how.threads)
    chunk = time.perf_counter() - start  # with opening the model, which each evaluation does too
    evaluations = 1 if scope.largest is not None else len(scope.sizes) + 1 + RIVALS
    need = buffers(model, how.context)
    logits = 2 * how.chunks * how.context * max(tensor.shape[0] for tensor in scope.base.tensors)
    return Forecast(evaluations, evaluations * chunk * how.chunks, file.size + need.total, file.size + logits)


def fit_size(
    model: str | os.PathLike[str],
    budget: int,
    how: Measuring,
    *,
    guide: Guide | None = None,
    progress: Progress | None = None,
) -> Sized:
    """The best types for a file of at most so many bytes.

    Args:
        model: an unquantized GGUF file.
        budget: bytes of the whole file.
        how: the text, and how to read it.
        guide: an importance matrix; the presets are made with it too.
        progress: called with what is done, how many of it, and how many there are.

    Raises:
        InputError: the budget is too small for any choice, or the model is quantized already.
        GGUForgeError: see `Meter.evaluation`.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; what was measured is kept in `how.store`.
    """
    tell = progress or (lambda label, done, total: None)
    scope = _scope(model, budget, guide)
    plans = {preset.name: plan for preset, plan in _presets_within(scope.base, guide, budget)[:RIVALS]}
    nearest = next(iter(plans), COARSE.name)  # the file type that the metadata name
    if scope.largest is not None:
        chosen = retype(scope.base, nearest, guide=guide, overrides=_types(scope.largest))
        return replace(_verified(Path(model), how, chosen, {}, tell), everything=True)
    with how.meter(Path(model), verify=False) as meter:
        settings = f"{named_hash(how.text)['sha256']} {how.context} {how.chunks}"
        matters = sensitivities(
            scope.base, scope.coarse, list(scope.sizes), meter, settings, how.store,
            lambda done, total: tell("sensitivity", done, total),
        )  # fmt: skip
    found = allocate(_options(scope, matters, lambda done, total: tell("errors", done, total)), scope.budget)
    types = _types({name: one.type for name, one in found.items()})
    chosen = _explained(retype(scope.base, nearest, guide=guide, overrides=types), matters)
    return _verified(Path(model), how, chosen, plans, tell)


def _verified(model: Path, how: Measuring, chosen: Plan, plans: dict[str, Plan], tell: Progress) -> Sized:
    """The choice and the presets on text that was not used for choosing."""
    measured = []
    with how.meter(model, verify=True) as meter:
        for done, (name, plan) in enumerate({"chosen": chosen, **plans}.items()):
            tell("verification", done, 1 + len(plans))
            measured.append(Rival(name, plan, meter.measurement(plan)))
    first, *rivals = measured
    rivals.sort(key=lambda rival: rival.divergence)
    best = rivals[0] if rivals and rivals[0].divergence < first.divergence else first
    return Sized(best, first, tuple(rivals))


def _types(wanted: Mapping[str, T]) -> Overrides:
    """Exactly these types."""
    return Overrides(patterns=tuple((re.compile(f"^{re.escape(name)}$"), kind) for name, kind in wanted.items()))


def _options(scope: Scope, matters: dict[str, float], tell: Callable[[int, int], None]) -> dict[str, list[Option]]:
    """What each tensor could be: the damage grows with the error as it was measured at the coarse type."""
    tensors = {tensor.name: tensor for tensor in scope.coarse.tensors}
    found = {}
    for done, (name, usual) in enumerate(scope.sizes.items()):
        tell(done, len(scope.sizes))
        tensor = tensors[name]
        errors = relative_errors(tensor, {tensor.type, *usual})
        sizes = _sizes(tensor, errors, scope.coarse.alignment)
        scale = max(matters[name], FLOOR) / (errors[tensor.type] or 1.0)
        found[name] = [Option(kind, sizes[kind], error * scale) for kind, error in errors.items()]
    return found


def _sizes(tensor: TensorPlan, kinds: Iterable[T], alignment: int) -> dict[T, int]:
    """Bytes of a tensor, padding included, in each type whose blocks divide its rows."""
    fitting = (kind for kind in kinds if tensor.row_length % GGML_QUANT_SIZES[kind][0] == 0)
    return {kind: padded(tensor.rows * row_bytes(kind, tensor.row_length), alignment) for kind in fitting}


def _presets_within(base: Plan, guide: Guide | None, budget: int) -> list[tuple[Preset, Plan]]:
    """All quantized presets whose files fit, largest first."""
    found = []
    for preset in PRESETS.values():
        if preset.base in UNQUANTIZED or preset.name == "MXFP4_MOE":
            continue
        try:
            plan = retype(base, preset, guide=guide)
        except InputError:  # it needs an importance matrix
            continue
        if plan.size <= budget:
            found.append((preset, plan))
    return sorted(found, key=lambda one: -one[1].size)


def _explained(plan: Plan, matters: dict[str, float]) -> Plan:
    def reason(tensor: TensorPlan) -> TensorPlan:
        if tensor.name not in matters:
            return tensor
        return replace(
            tensor, reason=f"chosen for the size; alone in a coarse type it costs {matters[tensor.name]:.2g} nats"
        )

    return replace(plan, tensors=tuple(map(reason, plan.tensors)))
