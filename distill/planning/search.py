"""Looks for the most capable student that a machine can run: as large as memory and speed allow, by measured figures.

Sizes are those of the plan that `gguforge convert` would execute, memory is llama.cpp's own (a dry run that allocates
nothing), and speed comes from models of random weights that are written, run for a second and removed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gguforge.convert.conversion import plan_weights
from gguforge.distill.planning.cost import Budget
from gguforge.distill.planning.family import Family
from gguforge.distill.planning.shapes import Shape
from gguforge.quant.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan
from gguforge.runtime.machine import available_memory
from gguforge.runtime.pace import Pace, Point, bytes_per_token, measure_decoding
from gguforge.runtime.stand_in import buffers_of, write_random

SLACK = 0.96  # a shape is not looked at closely when so much of its estimated size does not fit
SHOWN = 4  # students that are proposed, each of another hidden size
LARGEST_SAMPLE = 400 << 20  # bytes that a token reads of the largest model that is measured for the fit
SAMPLES = 3  # models for the fit, each half as large as the one before
TRIALS = 4  # proposals that are measured until one is fast enough

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What the machine gives.

    Attributes:
        memory: bytes, for everything.
        speed: tokens a second that are wanted; None for any.
        context, cache_type: tokens of context, and the type of their keys and values.
        preset: of the weights.
    """

    memory: int
    speed: float | None = None
    context: int = 4096
    cache_type: str = "f16"
    preset: str = "Q4_K_M"


@dataclass(frozen=True)
class Candidate:
    """A student that could be made.

    Attributes:
        shape: its sizes.
        plan: of its file.
        loss: what the scaling law expects with the training that the budget allows.
        memory: bytes that running it takes: weights, keys and values, buffers, the process.
        forecast: tokens a second by the fit; None where nothing was measured.
        measured: tokens a second of this very shape; None if it was not run.
    """

    shape: Shape
    plan: Plan = field(repr=False)
    loss: float
    memory: int
    forecast: float | None
    measured: float | None = None


class Planner:
    """Sizes and needs of the students of one family; each is found out once.

    Args:
        family: theirs.
        limits: of the machine.
        budget: of their training.
    """

    def __init__(self, family: Family, limits: Limits, budget: Budget) -> None:
        self.family, self.limits, self.budget = family, limits, budget
        self._plans: dict[Shape, Plan] = {}
        self._beside: dict[tuple[Shape, int, str], int] = {}
        self._losses: dict[Shape, float] = {}
        self._rates: dict[tuple[int, bool], tuple[int, float, int]] = {}

    def plan(self, shape: Shape) -> Plan:
        """The file of a student."""
        if shape not in self._plans:
            made = plan_weights(self.family.config_of(shape), self.limits.preset)
            self._plans[shape] = Plan({**made.metadata, **self.family.tokenizer}, made.tensors)
        return self._plans[shape]

    def memory(self, shape: Shape) -> int:
        """Bytes that running a student takes."""
        key = shape, self.limits.context, self.limits.cache_type
        if key not in self._beside:
            self._beside[key] = buffers_of(self.plan(shape), self.limits.context, self.limits.cache_type).total
        return self.plan(shape).data_bytes + self._beside[key]

    def loss(self, shape: Shape) -> float:
        """What the scaling law expects of a student."""
        if shape not in self._losses:
            self._losses[shape] = self.budget.loss(shape, self.family)
        return self._losses[shape]

    def best(self, shapes: Iterable[Shape], pace: Pace | None) -> list[Candidate]:
        """The best that fits of every hidden size, best first; none if none fits."""
        widths: dict[int, list[Shape]] = {}
        for shape in shapes:
            widths.setdefault(shape.hidden, []).append(shape)
        found = [self._first(some, pace) for some in widths.values()]
        return sorted((one for one in found if one is not None), key=lambda one: (one.loss, -one.shape.layers))

    def _first(self, shapes: Sequence[Shape], pace: Pace | None) -> Candidate | None:
        """The best that fits, of shapes of one hidden size."""
        for shape in sorted(shapes, key=lambda one: (self.loss(one), -one.layers)):
            size, read = (int(SLACK * one) for one in self.estimate(shape))
            if self._allows(size + self._cache(shape), read, pace):
                found = self.candidate(shape, pace)
                if self.fits(found, pace):
                    return found
        return None

    def fits(self, one: Candidate, pace: Pace | None) -> bool:
        """Whether a student keeps to the limits."""
        return self._allows(one.memory, bytes_per_token(one.plan), pace)

    def estimate(self, shape: Shape) -> tuple[int, int]:
        """Bytes of a student's weights, and of those that a token reads, from one plan of its hidden size."""
        key = shape.hidden, shape.tied
        if key not in self._rates:
            made = self.plan(shape)
            outside = sum(tensor.nbytes for tensor in made.tensors if not tensor.name.startswith("blk."))
            rate = (made.data_bytes - outside) / shape.body
            self._rates[key] = outside, rate, made.data_bytes - bytes_per_token(made)
        outside, rate, unread = self._rates[key]
        size = outside + int(rate * shape.body)
        return size, size - unread

    def _cache(self, shape: Shape) -> int:
        name = {"f32": "F32", "f16": "F16"}.get(self.limits.cache_type, self.limits.cache_type.upper())
        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        return int(shape.cache(self.limits.context) * nbytes / elements / 2)

    def _allows(self, memory: int, read: int, pace: Pace | None) -> bool:
        slow = pace is not None and self.limits.speed is not None and pace.speed(read) < self.limits.speed
        return memory <= self.limits.memory and not slow

    def candidate(self, shape: Shape, pace: Pace | None) -> Candidate:
        """A student with its needs, whether it fits or not."""
        made = self.plan(shape)
        speed = None if pace is None else pace.speed(bytes_per_token(made))
        return Candidate(shape, made, self.loss(shape), self.memory(shape), speed)

    def nearest(self, shapes: Sequence[Shape], pace: Pace | None) -> Candidate:
        """The student that misses the limits by the smallest factor."""

        def miss(shape: Shape) -> float:
            size, read = self.estimate(shape)
            slow = 0.0 if pace is None or self.limits.speed is None else self.limits.speed / pace.speed(read)
            return max((size + self._cache(shape)) / self.limits.memory, slow)

        return self.candidate(min(shapes, key=miss), pace)


def measured(plan: Plan, threads: int) -> Point:
    """Run a model of random weights.

    Raises:
        EngineError: llama.cpp cannot run it.
        OutputError: there is no room for its file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stand-in.gguf"
        write_random(plan, path)
        return Point(bytes_per_token(plan), measure_decoding(path, threads))


def samples(planner: Planner, shapes: Sequence[Shape]) -> Iterator[Plan]:
    """Models to fit a machine's speed to, the largest first: of each size the one that would be proposed.

    Time a byte depends on the mix of types and on the number of layers too, which these have like the proposals.
    """
    free = available_memory() or planner.limits.memory
    largest = min(LARGEST_SAMPLE, planner.limits.memory // 2, free // 2)
    sizes = {shape: planner.estimate(shape)[1] for shape in shapes}
    chosen: list[Shape] = []
    for number in range(SAMPLES):
        room = max(largest / 2**number, min(sizes.values()))
        best = min((one for one in shapes if sizes[one] <= room), key=planner.loss)
        if best not in chosen:
            chosen.append(best)
    return map(planner.plan, chosen)


def pace_here(planner: Planner, shapes: Sequence[Shape], threads: int, say: Say) -> Pace:
    """Measure this machine's speed with the planner's preset; errors as `measured`."""
    check_any(shapes, planner.family)
    points = []
    for plan in samples(planner, shapes):
        say(f"measuring a model of {plan.data_bytes / 1e6:.0f} MB")
        points.append(measured(plan, threads))
    return Pace(planner.limits.preset, threads, tuple(points))


def propose(planner: Planner, shapes: Sequence[Shape], pace: Pace | None, here: bool, say: Say) -> list[Candidate]:
    """The best few students, the first of them run here if that is the machine.

    Args:
        planner: with the limits.
        shapes: to choose from.
        pace: the machine's speed; None if it does not matter.
        here: whether this is the machine, so that the choice can be run; a choice that turns out too slow corrects the
            fit, and another is chosen.
        say: receives a line before each measurement.

    Raises:
        InputError: nothing fits; the message names the nearest that would.
        EngineError, OutputError: see `measured`.
    """
    check_any(shapes, planner.family)
    limits = planner.limits
    for trial in range(TRIALS):
        found = planner.best(shapes, pace)[:SHOWN]
        if not found:
            raise nothing_fits(planner, shapes, pace)
        if pace is None or not here or found[0].memory > (available_memory() or found[0].memory):
            return found
        say(f"measuring the choice, {found[0].plan.data_bytes / 1e6:.0f} MB")
        point = measured(found[0].plan, pace.threads)
        found[0] = replace(found[0], measured=1 / point.seconds)
        if limits.speed is None or 1 / point.seconds >= limits.speed:
            return found
        if trial == TRIALS - 1:
            say(f"still too slow after {TRIALS} trials; is the machine busy?")
            return found
        pace = pace.corrected(point)
    raise AssertionError("the last trial returns")


def check_any(shapes: Sequence[Shape], family: Family) -> None:
    """Whether there are students at all.

    Raises:
        InputError: the teacher is as small as the smallest of them.
    """
    if not shapes:
        raise InputError("the teacher is too small for a smaller student of 256 channels", path=family.teacher)


def nothing_fits(planner: Planner, shapes: Sequence[Shape], pace: Pace | None) -> InputError:
    """What to say when no student fits."""
    near, limits = planner.nearest(shapes, pace), planner.limits
    wanted = f"{limits.memory / 1e6:.0f} MB" + (f" and {limits.speed:g} tokens/s" if limits.speed is not None else "")
    offers = f"{near.memory / 1e6:.0f} MB" + (f" and {near.forecast:.1f} tokens/s" if near.forecast is not None else "")
    return InputError(
        "no student fits", expected=wanted, found=f"{offers} for the nearest, {near.shape}",
        remedy="Allow that, give a smaller --ctx or a smaller --type.",
    )  # fmt: skip
