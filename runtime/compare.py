"""Compares several files made of one model: what each costs in bytes and in divergence, and where the loss comes from.

Every figure is measured on the text against the reference, by the real kernels. Reference and file run side by side,
one file after the other, so memory holds two models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguforge.quant.plan import Plan
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import GGUFFile
from gguforge.quant.splits import read_model
from gguforge.runtime.answers import Answer, answers, marked
from gguforge.runtime.engine import type_name
from gguforge.runtime.evaluate import DEFAULT_CHUNK, Evaluation, evaluate
from gguforge.runtime.hybrid import differing_parts, hybrid
from gguforge.runtime.meter import Meter
from gguforge.runtime.overlap import find_calibration

Part = tuple[int | None, str]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One file beside the reference.

    Attributes:
        path: the file.
        type: its preset's name, or the block type of most of its bytes.
        plan: its tensors and their types.
        nbytes: of the file, or of all files of a split model.
        evaluation: on the text, against the reference.
        parts: mean divergence, nats, of the reference with only this part taken from the file, by layer and kind.
        answers: to the prompts, pieces marked that are not the reference's.
    """

    path: Path
    type: str
    plan: Plan
    nbytes: int
    evaluation: Evaluation
    parts: dict[Part, float] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()

    @property
    def divergence(self) -> float:
        """Mean KL divergence from the reference, nats."""
        assert self.evaluation.comparison is not None
        return self.evaluation.comparison.mean.value


@dataclass(frozen=True, eq=False)
class Report:
    """A comparison.

    Attributes:
        reference, reference_type: the file that all others are measured against.
        reference_bytes: its size.
        text: what was read.
        candidates: smallest first.
        prompts: what all were asked.
        reference_answers: the reference's.
        part_chunks: chunks that each part was measured on; 0 when they were not.
    """

    reference: Path
    reference_type: str
    reference_bytes: int
    text: Path
    candidates: tuple[Candidate, ...]
    prompts: tuple[str, ...] = ()
    reference_answers: tuple[Answer, ...] = ()
    part_chunks: int = 0

    def frontier(self) -> list[Candidate]:
        """The files that no smaller or equally large one beats in mean divergence."""
        best: list[Candidate] = []
        for candidate in sorted(self.candidates, key=lambda one: (one.nbytes, one.divergence)):
            if not best or candidate.divergence < best[-1].divergence:
                best.append(candidate)
        return best


def compare(
    files: Sequence[str | os.PathLike[str]],
    reference: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    part_chunks: int = 0,
    prompts: Sequence[str] = (),
    answer_tokens: int = 48,
    threads: int | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure each file against the reference.

    Args:
        files: GGUF files of the same model.
        reference: the GGUF file they were made of.
        text: held-out text, or conversations in a .jsonl file.
        context, chunks, threads: see `evaluate`.
        part_chunks: chunks to measure each part of each file on, 0 for none: a map of layers and kinds of tensors costs
            one evaluation a part, and the disk space of one more reference meanwhile.
        prompts: what to ask each file.
        answer_tokens: most tokens of an answer.
        scratch: folder for the files of parts; the system's by default.
        progress: called with what is done, how many of it, and how many there are.

    Raises:
        GGUForgeError: see `evaluate`, `hybrid` and `answers`.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came.
    """
    tell = progress or (lambda label, done, total: None)
    base = read_model(reference)

    def measured(path: str | os.PathLike[str], label: str) -> Evaluation:
        known = find_calibration(path)
        return evaluate(
            path, text, against=reference, context=context, chunks=chunks, threads=threads,
            calibration=frozenset() if known is None else known.fingerprint,
            progress=lambda done, total, _: tell(label, done, total),
        )  # fmt: skip

    def answered(path: str | os.PathLike[str]) -> list[Answer]:
        return answers(path, prompts, tokens=answer_tokens, context=context, threads=threads) if prompts else []

    expected = answered(reference)
    found = []
    with Meter(base.path, text, context=context, chunks=part_chunks or None, threads=threads, scratch=scratch) as meter:
        for path in files:
            file = read_model(path)
            whole = measured(path, Path(path).name)
            parts = _parts(meter, plan_of_file(base), file, tell) if part_chunks else {}
            said = tuple(marked(ours, theirs) for ours, theirs in zip(answered(path), expected, strict=True))
            found.append(Candidate(Path(path), type_name(file), plan_of_file(file), file.size, whole, parts, said))
    found.sort(key=lambda one: one.nbytes)
    return Report(
        Path(reference), type_name(base), base.size, Path(text), tuple(found), tuple(prompts), tuple(expected),
        part_chunks,
    )  # fmt: skip


def _parts(meter: Meter, base: Plan, file: GGUFFile, tell: Progress) -> dict[Part, float]:
    """The mean divergence that each part of a file causes alone, in nats."""
    found = {}
    other = plan_of_file(file)
    parts = differing_parts(base, other)
    for done, (part, names) in enumerate(parts.items()):
        found[part] = meter.divergence(hybrid(base, other, names))
        tell(f"{file.path.name} by parts", done + 1, len(parts))
    return found
