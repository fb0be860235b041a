"""Soft targets from teachers and text: shard by shard, each made by a function of its inputs and nothing else.

What decides a shard's bytes is in the manifest; a shard that is there and sound is not made again. So a run that was
stopped goes on where it was, several processes or machines can divide the shards among them, and what a killed run
loses is the shard that it worked on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguforge.distill.collector import Collector, Settings
from gguforge.distill.data import read_corpus
from gguforge.distill.hub import local_text
from gguforge.distill.targets import Manifest, open_shard, teacher_loss, write_manifest
from gguforge.distill.teachers.open import TeacherSource, open_teacher
from gguforge.quant.errors import OutputError
from gguforge.runtime.interrupt import deferred_signals


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done, total: bytes of text, of the shards that this run makes.
        tokens: read so far.
        seconds: since the first token.
    """

    done: int
    total: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Collected:
    """What a run did.

    Attributes:
        manifest: of the folder.
        made, kept: shards that it wrote, and that it found done.
        missing: shards of the folder that others have to make.
        tokens, rows, nbytes: of the shards that are there.
        teacher_loss: the teacher's cross-entropy on the tokens that count, in nats for each.
        last: progress at the end.
    """

    manifest: Manifest
    made: int
    kept: int
    missing: int
    tokens: int
    rows: int
    nbytes: int
    teacher_loss: float
    last: Progress


def collect(
    teachers: Sequence[TeacherSource],
    text: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    shard: tuple[int, int] = (1, 1),
    progress: Callable[[Progress], None] | None = None,
) -> Collected:
    """Make the shards that are not there yet.

    Args:
        teachers: one, or several whose mixture is wanted.
        text: plain text and .jsonl files (see `gguforge.distill.data`), data sets (see `gguforge.distill.hub`).
        folder: where the targets go; made if need be.
        settings: what to keep.
        shard: (i, n) for every n-th shard from the i-th on, so that n runs make all of them.
        progress: called after every document.

    Raises:
        GGUForgeError: an input is missing or damaged, the folder holds other targets, a teacher fails.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; finished shards stay.
    """
    settings, folder = settings or Settings(), Path(folder)
    with opened(teachers, local_text(text, folder), settings) as collector:
        kept, missing = begin(folder, collector.manifest, shard)
        last = _make_all(collector, folder, missing, progress)
    return summary(folder, collector.manifest, len(missing), kept, last)


@contextmanager
def opened(
    teachers: Sequence[TeacherSource], text: Sequence[str | os.PathLike[str]], settings: Settings
) -> Iterator[Collector]:
    """Teachers and text, ready to make shards; errors as `collect`."""
    corpus = read_corpus(text, settings.context, settings.text_of_a_shard)
    with ExitStack() as stack:
        ready = [stack.enter_context(open_teacher(source, settings.context)) for source in teachers]
        yield Collector(ready, [source.weight for source in teachers], corpus, settings)


def begin(folder: Path, manifest: Manifest, shard: tuple[int, int]) -> tuple[int, list[int]]:
    """Write the manifest; how many of this run's shards are there and sound, and the numbers of the others.

    Raises:
        OutputError: the folder holds other targets, or cannot be written.
        InputError: a shard that is there is damaged.
    """
    _make_folder(folder)
    write_manifest(folder, manifest)
    ours = range(shard[0] - 1, manifest.shards, shard[1])
    missing = [number for number in ours if not _is_made(folder, manifest, number)]
    return len(ours) - len(missing), missing


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError("this is not a folder", path=folder, remedy="Give a folder for the targets.")
    if not folder.absolute().parent.is_dir():
        raise OutputError("no such folder", path=folder.parent, remedy="Make it first, or write elsewhere.")
    folder.mkdir(exist_ok=True)


def _is_made(folder: Path, manifest: Manifest, number: int) -> bool:
    """Whether a shard is there; one that is damaged or of other targets is an error, never silently made again."""
    if not (folder / manifest.shard_name(number)).exists():
        return False
    open_shard(folder, manifest, number)
    return True


def _make_all(
    collector: Collector, folder: Path, numbers: Sequence[int], progress: Callable[[Progress], None] | None
) -> Progress:
    """Make shards one after the other."""
    started = time.monotonic()
    state = Progress(0, sum(collector.corpus.sizes[number] for number in numbers), 0, 0.0)

    def read(nbytes: int, tokens: int) -> None:
        nonlocal state
        seconds = time.monotonic() - started
        state = replace(state, done=state.done + nbytes, tokens=state.tokens + tokens, seconds=seconds)
        if progress is not None:
            progress(state)

    with deferred_signals(collector.interrupt) as signals:
        for number in numbers:
            if signals.came or not collector.make(number, folder, read):
                break
        signals.raise_if_came()
    return state


def summary(folder: Path, manifest: Manifest, made: int, kept: int, last: Progress) -> Collected:
    """What a run did, and what is in the folder now."""
    there = [
        open_shard(folder, manifest, number, verify=False)
        for number in range(manifest.shards)
        if (folder / manifest.shard_name(number)).exists()
    ]
    tokens, rows, nbytes = (sum(getattr(shard, name) for shard in there) for name in ("tokens", "rows", "nbytes"))
    missing = manifest.shards - len(there)
    return Collected(manifest, made, kept, missing, tokens, rows, nbytes, teacher_loss(there), last)
