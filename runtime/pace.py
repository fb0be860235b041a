"""How fast a machine writes: the time of a token measured on a few models, and what it says of other sizes.

A token waits for every weight that is read for it: its time is a constant and its bytes divided by the bandwidth. Both
are fitted to measured models (decoding one token after the other from an empty context, as llama-bench's tg does). What
one machine measured can be kept in a file and used on another. A forecast holds for one preset and number of threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from gguforge.quant.errors import InputError
from gguforge.quant.files import replacing
from gguforge.quant.plan import Plan
from gguforge.quant.splits import read_model
from gguforge.runtime.checks import check_runnable
from gguforge.runtime.loaded import Loaded

WARMING = 4  # tokens that are not counted: pages are read, threads started
SECONDS = 1.5  # of measuring, at least MINIMUM tokens
MINIMUM, MAXIMUM = 8, 256  # tokens
FORMAT = 1


@dataclass(frozen=True)
class Point:
    """One measured model.

    Attributes:
        bytes: read for every token.
        seconds: of a token.
    """

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Pace:
    """A machine's speed with one preset.

    Attributes:
        preset: the weights' mix of types.
        threads: that computed.
        points: what was measured, at least one model.
    """

    preset: str
    threads: int
    points: tuple[Point, ...]

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a token without any bytes, and seconds of a byte; both at least 0, the second more.

        The line that is nearest to the points, each distance taken as a share of its point's time.
        """
        size, seconds = (np.array([getattr(point, name) for point in self.points]) for name in ("bytes", "seconds"))
        weights = np.stack([np.ones(len(size)), size], 1) / seconds[:, None]
        constant, slope = np.linalg.lstsq(weights, np.ones(len(size)), rcond=None)[0] if len(size) > 1 else (0, 0)
        if constant <= 0 or slope <= 0:
            share = size / seconds
            constant, slope = 0.0, share.sum() / (share**2).sum()
        return float(constant), float(slope)

    def seconds(self, nbytes: int) -> float:
        """Of a token for which so many bytes are read."""
        constant, slope = self.line
        return constant + slope * nbytes

    def speed(self, nbytes: int) -> float:
        """Tokens a second, likewise."""
        return 1 / self.seconds(nbytes)

    def corrected(self, point: Point) -> Pace:
        """With one model more, and the others as much slower or faster as it was than the forecast for it."""
        factor = point.seconds / self.seconds(point.bytes)
        points = (Point(one.bytes, one.seconds * factor) for one in self.points)
        return Pace(self.preset, self.threads, (*points, point))

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write it to a file that `load` reads.

        Raises:
            OutputError: the file exists, or cannot be written.
        """
        data = (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode()
        with replacing(path, len(data), overwrite) as part:
            part.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: it is something else.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            points = tuple(Point(int(one["bytes"]), float(one["seconds"])) for one in found["points"])
            made = cls(str(found["preset"]), int(found["threads"]), points)
            good = found["format"] == FORMAT and points and all(p.bytes > 0 and p.seconds > 0 for p in points)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise InputError("is no measurement of a machine", path=path, remedy="Make one with --measure.")
        return made


def bytes_per_token(plan: Plan) -> int:
    """Bytes of the weights that are read for every token: all but tables of which a token needs one row alone."""
    names = {tensor.name for tensor in plan.tensors}
    tables = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in names else set())
    return sum(tensor.nbytes for tensor in plan.tensors if tensor.name not in tables)


def measure_decoding(path: str | os.PathLike[str], threads: int, seconds: float = SECONDS) -> float:
    """The median time of a token, in seconds: one after the other, without sampling, from an empty context.

    Args:
        path: a GGUF file.
        threads: that compute.
        seconds: how long to measure.

    Raises:
        GGUFError: the file is damaged.
        EngineError: llama.cpp cannot run it.
    """
    file = read_model(path)
    check_runnable(file)
    with _Clock(file.path, context=WARMING + MAXIMUM, threads=threads, continues=False) as clock:
        return statistics.median(clock.times(seconds))


class _Clock(Loaded):
    """A model whose tokens are timed."""

    def times(self, seconds: float) -> Sequence[float]:
        """Seconds of each token, one after the other, until `seconds` have passed."""
        llama, one = self._llama, (ctypes.c_int32 * 1)(1)
        times: list[float] = []
        while len(times) < WARMING + MAXIMUM and (len(times) < WARMING + MINIMUM or sum(times[WARMING:]) < seconds):
            begun = time.perf_counter()
            if code := llama.llama_decode(self._context, llama.llama_batch_get_one(one, 1)):
                raise self._failure(code)
            llama.llama_synchronize(self._context)
            times.append(time.perf_counter() - begun)
        return times[WARMING:]
