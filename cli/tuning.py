"""`--quality` of `gguforge quantize`: better encodings at the same bytes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gguforge.cli.chunk_bar import chunk_bar
from gguforge.cli.common import Command, gathered, in_words

if TYPE_CHECKING:
    from gguforge.cli.writing import Writing
    from gguforge.quant.plan import Plan
    from gguforge.runtime.forward import Tokens

LEVELS = ("exact", "lossless", "high", "best")
TEXT_LEVELS = LEVELS[2:]


@dataclass(frozen=True)
class Tuning:
    """The options of quality.

    Attributes:
        quality: one of `LEVELS`.
        text: the calibration text.
        text_chunks: how many of its chunks to read at most.
    """

    quality: str
    text: str | None
    text_chunks: int | None

    def check(self) -> None:
        """Whether the options belong together.

        Raises:
            UsageError: they do not.
        """
        if self.quality == "best" and self.text is None:
            raise click.UsageError("--quality best needs a calibration text: -f TEXT.")
        if self.quality not in TEXT_LEVELS and self.text is not None:
            raise click.UsageError(
                "-f TEXT is for --quality high or best; gguforge calibrate makes an importance matrix of it."
            )

    @contextmanager
    def improved(self, plan: Plan, model: str, output: str, writing: Writing) -> Iterator[Plan]:
        """The plan with better encodings, to be executed within the block: then what was kept for it goes.

        Args:
            plan: the quantized model.
            model: the unquantized one.
            output: the file that will be written; the folder `OUTPUT.tune` beside it keeps what is done.
            writing: of its options `overwrite`, `workers`, `quiet`; with `dry_run` nothing is improved.
        """
        if self.quality == "exact":
            hint_at_grids(plan, writing)
            yield plan
            return
        plan = on_grids(plan, self.quality, writing)
        if self.quality == "lossless":
            yield plan
            return
        if writing.dry_run:
            click.echo(self._forecast(plan, self._chunks(model), writing.workers), err=writing.as_json)
            yield plan
            return
        folder = Path(f"{output}.tune")
        yield self._tuned(plan, model, output, folder, writing)
        shutil.rmtree(folder)

    def _tuned(self, plan: Plan, model: str, output: str, folder: Path, writing: Writing) -> Plan:
        from gguforge.quant.files import check_target
        from gguforge.runtime.tune import tune
        from gguforge.runtime.tuning_text import tuning_metadata

        check_target(Path(output), writing.overwrite)
        chunks = self._chunks(model)
        if not writing.quiet:
            click.echo(self._forecast(plan, chunks, writing.workers), err=True)
        if self.text is not None:
            plan = replace(plan, metadata={**plan.metadata, **tuning_metadata(self.text, len(chunks))})
        how = {"sequential": self.quality == "best", "guided": self.text is None}
        try:
            with chunk_bar("tune", writing.quiet) as bar:
                return tune(plan, chunks, folder, **how, threads=writing.workers, progress=bar)
        except (KeyboardInterrupt, SystemExit):
            if folder.exists():
                click.echo(f"kept what was done in {folder}; the same command goes on from there", err=True)
            raise

    def _chunks(self, model: str) -> Tokens:
        """What is read for tuning."""
        from gguforge.runtime.tuning_text import random_chunks, tuning_chunks

        return random_chunks(model) if self.text is None else tuning_chunks(model, self.text, self.text_chunks)

    def _forecast(self, plan: Plan, chunks: Tokens, threads: int | None) -> str:
        """One line: what tuning will take, by a short probe."""
        from gguforge.runtime.tuning_forecast import forecast_tuning

        found = forecast_tuning(plan, chunks, sequential=self.quality == "best", threads=threads)
        needs = f"{in_words(found.memory)} of memory and {in_words(found.disk)} of disk meanwhile"
        return f"tuning on {len(chunks)} chunks takes about {duration(found.seconds)}, {needs}"

    def prove(self, model: str, output: Path | None, writing: Writing) -> None:
        """Measure a tuned file on chunks of the text that tuning has not read; say so, and note it in the receipt."""
        if self.text is None or self.quality not in TEXT_LEVELS or output is None:
            return
        from gguforge.quant.receipt import receipt_path
        from gguforge.runtime.evaluate import evaluate
        from gguforge.runtime.measured import measurement, note
        from gguforge.runtime.tuning_text import proof_chunks

        skip, chunks = proof_chunks(model, self.text)
        if not chunks:
            return
        with chunk_bar("measure", writing.quiet) as bar:
            found = evaluate(
                output, self.text, against=model, chunks=chunks, skip=skip, threads=writing.workers,
                progress=lambda done, total, _: bar(done, total),
            )  # fmt: skip
        measured = measurement(found, self.text, model, skip)
        if receipt_path(output).exists():
            note(measured, output)
        if not writing.quiet:
            click.echo(f"{measured.words()}, which tuning has not read", err=True)


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(45), duration(400), duration(9000)
    ('45 s', '7 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def on_grids(plan: Plan, quality: str, writing: Writing) -> Plan:
    """The plan of a file that need not hold llama.cpp's bytes: what lies on a grid stays there; with a remark."""
    from gguforge.quant.lossless import is_lossless, lossless_plan
    from gguforge.quant.metadata import string
    from gguforge.quant.quality import QUALITY_KEY

    plan = lossless_plan(replace(plan, metadata={**plan.metadata, QUALITY_KEY: string(quality)}))
    kept = Counter(tensor.type.name for tensor in plan.tensors if is_lossless(tensor))
    if kept and not writing.quiet:
        types = ", ".join(f"{count} as {name}" for name, count in kept.most_common())
        click.echo(f"written without loss, being on a quantization grid already: {types}", err=True)
    return plan


def hint_at_grids(plan: Plan, writing: Writing) -> None:
    """Say so where llama.cpp's encoders would lose something of weights that are on a grid already."""
    from gguforge.quant.lossless import hint

    found = None if writing.quiet else hint(plan)
    if found is not None:
        click.echo(
            f"{found[0]} and others seem to lie on the grid of {found[1].name} already: "
            "--quality lossless keeps them exactly.",
            err=True,
        )


def tuning_options(command: Command) -> Command:
    """The options of quality; they reach the command as the argument `tuning`."""
    return gathered(
        Tuning,
        "tuning",
        click.option(
            "--quality",
            type=click.Choice(LEVELS),
            default="exact",
            show_default=True,
            help="exact: llama.cpp's bytes. lossless: the same, but weights that lie on a quantization grid already "
            "stay there. high: error feedback, each matrix by itself, with -f by what the text shows. best: block by "
            "block, among quantized neighbours; wants -f. The size is the same.",
        ),
        click.option("-f", "--calibration", "text", type=click.Path(), help="A text for --quality high and best."),
        click.option(
            "--calibration-chunks",
            "text_chunks",
            type=click.IntRange(1),
            metavar="N",
            help="Read at most so many chunks of 512 tokens, spread over the text.  [default: all]",
        ),
    )(command)
