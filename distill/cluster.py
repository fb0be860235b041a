"""Shards made by a pool of Ray actors, on this machine or on a cluster.

Each actor opens the teachers once and makes one shard after the other; as a shard is a function of its inputs alone, it
does not matter who makes it, or how often. Text, teachers and the folder must be reachable under the same paths from
every machine. Interface: https://docs.ray.io, Dataset.map_batches with a class.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gguforge.distill.collect import Collected, Progress, begin, opened, summary
from gguforge.distill.collector import Settings
from gguforge.distill.hub import local_text
from gguforge.distill.teachers.open import TeacherSource
from gguforge.quant.errors import EngineError, GGUForgeError, MissingExtraError

_RESTARTS = 2  # of an actor whose process dies; Ray's own choice is to try for ever


class ShardMaker:
    """An actor: numbers of shards in, what they hold out."""

    def __init__(self, teachers: Sequence[TeacherSource], text: Sequence[str], folder: str, settings: Settings) -> None:
        self._folder = Path(folder)
        self._stack = ExitStack()  # holds the teachers open as long as the actor lives
        self._collector = self._stack.enter_context(opened(teachers, text, settings))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of a batch."""
        tokens = []
        for number in batch["number"].tolist():
            read: list[int] = []
            self._collector.make(number, self._folder, lambda _, count, read=read: read.append(count))  # type: ignore[misc]
            tokens.append(sum(read))
        return {"number": batch["number"], "tokens": np.array(tokens)}


def collect_with_ray(
    teachers: Sequence[TeacherSource],
    text: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    settings: Settings,
    *,
    workers: int,
    gpus: float = 0.0,
    shard: tuple[int, int] = (1, 1),
    progress: Callable[[Progress], None] | None = None,
) -> Collected:
    """As `collect`, by a pool of actors.

    Args:
        workers: actors at a time.
        gpus: that each of them takes.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: an actor failed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "ray", "ray") from None
    teachers = [replace(source, threads=source.threads or 1) for source in teachers]  # workers share the processors
    folder = Path(folder).absolute()
    paths = [str(Path(path).absolute()) for path in local_text(text, folder)]
    with opened(teachers, paths, settings) as collector:
        manifest, sizes = collector.manifest, collector.corpus.sizes
        kept, missing = begin(folder, manifest, shard)
    state = Progress(0, sum(sizes[number] for number in missing), 0, 0.0)
    started = time.monotonic()
    made = _pool(missing, (teachers, paths, str(folder), settings), workers, gpus) if missing else ()
    try:
        for row in made:
            state = Progress(
                state.done + sizes[row["number"]], state.total, state.tokens + int(row["tokens"]),
                time.monotonic() - started,
            )  # fmt: skip
            if progress is not None:
                progress(state)
    except ray.exceptions.RayError as error:
        raise _failure(error) from error
    return summary(folder, manifest, len(missing), kept, state)


def _pool(missing: Sequence[int], arguments: tuple[Any, ...], workers: int, gpus: float) -> Iterator[dict[str, Any]]:
    """What actors say of every shard that they made; `arguments` are those of `ShardMaker`."""
    import ray.data

    threads = max(source.threads or 1 for source in arguments[0])  # teachers read one after the other
    rows = ray.data.from_items([{"number": number} for number in missing]).map_batches(
        ShardMaker,
        fn_constructor_args=arguments,
        batch_size=1,
        concurrency=workers,
        num_cpus=threads,
        num_gpus=gpus,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
    )
    yield from rows.iter_rows()


def _failure(error: BaseException) -> GGUForgeError:
    """What an actor raised, or Ray's own last words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GGUForgeError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return EngineError(f"a Ray worker failed: {str(error).strip().splitlines()[-1]}")
