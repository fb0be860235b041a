"""Makes shards of soft targets from opened teachers, a text and settings: a function of these and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gguforge.distill.data import Corpus, Mask, documents
from gguforge.distill.sampling import Draws, Reducer, mixture, uniforms
from gguforge.distill.shards import MAX_ENTRY, Ids, Kind, Rows, Scored, predicting, write_shard
from gguforge.distill.targets import KEY, Manifest
from gguforge.distill.teachers.base import Teacher
from gguforge.quant.errors import InputError

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
            Reducer(settings.kind, draws, teacher.vocabulary, settings.temperature, teacher.threads)
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
