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

import numpy as np

from gguforge.distill.data import Corpus, Mask, documents, read_corpus
from gguforge.distill.hub import local_text
from gguforge.distill.sampling import Draws, Reducer, mixture, uniforms
from gguforge.distill.shards import MAX_ENTRY, Ids, Kind, Rows, Scored, predicting, write_shard
from gguforge.distill.targets import KEY, Manifest, open_shard, teacher_loss, write_manifest
from gguforge.distill.teachers.base import Teacher
from gguforge.distill.teachers.open import TeacherSource, open_teacher
from gguforge.quant.errors import InputError, OutputError
from gguforge.runtime.interrupt import deferred_signals

SHARD_BYTES = {"sampled": 1 << 18, "top-k": 1 << 18, "full": 1 << 13}
"""Default text of a shard: about 65,000 tokens, or 2,000 where every row is as long as the vocabulary."""


@dataclass(frozen=True)
class Settings:
    """What to keep, of which text.

    Attributes:
        kind: "sampled", "top-k" or "full".
        size: draws, or entries of a top-k row; 0 for full rows.
        draws: how they are drawn (see `gguforge.distill.sampling`).
        seed: of the draws.
        temperature: the teacher's scores are divided by it.
        context: tokens of a document at most.
        shard_bytes: text that makes a shard; None for the kind's default.
    """

    kind: Kind = "sampled"
    size: int = 50
    draws: Draws = "stratified"
    seed: int = 0
    temperature: float = 1.0
    context: int = 512
    shard_bytes: int | None = None

    @property
    def text_of_a_shard(self) -> int:
        """Bytes."""
        return self.shard_bytes or SHARD_BYTES[self.kind]


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


class Collector:
    """Opened teachers, a text and settings: they make shards.

    Attributes:
        corpus: the text.
        manifest: all that decides the shards' bytes.

    Raises:
        InputError: teachers, text and settings do not fit each other.
    """

    def __init__(
        self, teachers: Sequence[Teacher], weights: Sequence[float], corpus: Corpus, settings: Settings
    ) -> None:
        _check(teachers, corpus, settings)
        self._teachers, self.corpus, self._settings = teachers, corpus, settings
        self._draws = shares(weights, settings.size) if len(teachers) > 1 else [settings.size]
        self._weights = [draws / settings.size for draws in self._draws] if len(teachers) > 1 else [1.0]
        self._reducers = [
            Reducer(settings.kind, draws, teacher.vocabulary, settings.temperature)
            for teacher, draws in zip(teachers, self._draws, strict=True)
        ]
        self.manifest = self._manifest()

    def _manifest(self) -> Manifest:
        settings, identity = self._settings, self._teachers[0].tokenizer.identity
        records = zip((teacher.record for teacher in self._teachers), self._weights, strict=True)
        return Manifest(
            kind=settings.kind,
            size=settings.size,
            draws=settings.draws if settings.kind == "sampled" else "",
            seed=settings.seed,
            temperature=float(settings.temperature),
            biased=settings.kind == "top-k",
            context=settings.context,
            vocabulary=max(teacher.vocabulary for teacher in self._teachers),
            tokens=identity.tokens,
            tokenizer_sha256=identity.sha256,
            template_sha256=identity.template_sha256 if self.corpus.conversations else "",
            teachers=tuple(replace(record, weight=weight) for record, weight in records),
            text=self.corpus.records,
            shard_bytes=settings.text_of_a_shard,
            shards=len(self.corpus.shards),
        )

    def make(self, number: int, folder: Path, read: Callable[[int, int], None]) -> bool:
        """Write one shard; False when it was interrupted.

        Args:
            read: called with the bytes of text and the tokens that were read since its last call.

        Raises:
            GGUForgeError: a teacher fails, refuses a conversation, or the shard cannot be written.
        """
        scored = []
        tokenizer = self._teachers[0].tokenizer
        for passage in self.corpus.shards[number]:
            begun = passage.start
            parts = list(documents(passage, tokenizer, self._settings.context))
            for count, (input_ids, mask) in enumerate(parts, 1):
                rows = self._rows(input_ids, mask)
                if rows is None:
                    return False
                scored.append(Scored(input_ids, mask, rows))
                reached = passage.start + (passage.stop - passage.start) * count // len(parts)
                read(reached - begun, len(input_ids))
                begun = reached
            read(passage.stop - begun, 0)
        path = folder / self.manifest.shard_name(number)
        write_shard(path, scored, self.manifest.layout, {KEY: self.manifest.key}, overwrite=True)
        return True

    def _rows(self, input_ids: Ids, mask: Mask) -> Rows | None:
        """A document's rows: of the one teacher, or of the mixture; None when it was interrupted."""
        positions, settings = predicting(mask), self._settings
        parts = []
        for stream, (teacher, reduce, draws) in enumerate(
            zip(self._teachers, self._reducers, self._draws, strict=True)
        ):
            at = np.empty((len(input_ids), 0))
            if settings.kind == "sampled":
                at = uniforms(settings.seed, input_ids, draws, settings.draws, stream)
            rows = teacher.rows(input_ids, positions, reduce, at[positions])
            if rows is None:
                return None
            parts.append(rows)
        return parts[0] if len(parts) == 1 else mixture(parts, self._weights)

    def interrupt(self) -> None:
        """Stop at once, for good; safe in a signal handler."""
        for teacher in self._teachers:
            teacher.interrupt()


def shares(weights: Sequence[float], draws: int) -> list[int]:
    """How many of the draws each teacher of a mixture makes.

    >>> shares([2, 1], 50)
    [33, 17]

    Raises:
        InputError: a teacher would make none.
    """
    exact = [weight * draws / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for number in rest[: draws - sum(whole)]:
        whole[number] += 1
    if 0 in whole:
        raise InputError("a teacher's weight is too small for a single draw", found=weights[whole.index(0)])
    return whole


def _check(teachers: Sequence[Teacher], corpus: Corpus, settings: Settings) -> None:
    """That teachers, text and settings fit each other."""
    first = teachers[0]
    for teacher in teachers:
        if settings.kind not in teacher.kinds:
            raise InputError(
                f"cannot give {settings.kind} targets", path=teacher.record.name, expected=" or ".join(teacher.kinds)
            )
        if teacher.tokenizer.identity != first.tokenizer.identity:
            raise InputError(
                f"has another tokenizer or chat template than {first.record.name}", path=teacher.record.name,
                remedy="Only teachers that cut text into the same tokens can be mixed.",
            )  # fmt: skip
    if len(teachers) > 1 and settings.kind != "sampled":
        raise InputError(f"several teachers cannot be mixed in {settings.kind} targets", remedy="Choose sampled ones.")
    if settings.kind == "sampled" and first.vocabulary * settings.size > MAX_ENTRY:
        most = MAX_ENTRY // first.vocabulary
        raise InputError("too many draws for this vocabulary", expected=f"at most {most}", found=settings.size)
    if corpus.conversations and not first.tokenizer.identity.template_sha256:
        raise InputError(
            "the model has no chat template", path=first.record.name, remedy="Give plain text instead of conversations."
        )


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
