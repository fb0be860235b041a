"""`--quality` of `gguforge quantize`: better encodings at the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gguforge.cli.chunk_bar import chunk_bar
from gguforge.cli.common import Command, gathered

if TYPE_CHECKING:
    from gguforge.cli.writing import Writing
    from gguforge.quant.plan import Plan

LEVELS = ("exact", "high", "best")


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
        if self.quality == "exact" and self.text is not None:
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
        from gguforge.quant.metadata import string
        from gguforge.quant.quality import QUALITY_KEY, refine_plan

        if self.quality == "exact" or writing.dry_run:
            yield plan
            return
        plan = replace(plan, metadata={**plan.metadata, QUALITY_KEY: string(self.quality)})
        if self.text is None:
            yield refine_plan(plan)
            return
        folder = Path(f"{output}.tune")
        yield self._tuned(plan, model, output, folder, writing)
        shutil.rmtree(folder)

    def _tuned(self, plan: Plan, model: str, output: str, folder: Path, writing: Writing) -> Plan:
        from gguforge.quant.files import check_target
        from gguforge.runtime.tune import tune
        from gguforge.runtime.tuning_text import tuning_chunks, tuning_metadata

        assert self.text is not None
        check_target(Path(output), writing.overwrite)
        chunks = tuning_chunks(model, self.text, self.text_chunks)
        plan = replace(plan, metadata={**plan.metadata, **tuning_metadata(self.text, len(chunks))})
        try:
            with chunk_bar("tune", writing.quiet) as bar:
                sequential = self.quality == "best"
                return tune(plan, chunks, folder, sequential=sequential, threads=writing.workers, progress=bar)
        except (KeyboardInterrupt, SystemExit):
            if folder.exists():
                click.echo(f"kept what was done in {folder}; the same command goes on from there", err=True)
            raise


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
            help="exact: llama.cpp's bytes. high: a better search; with -f error feedback, each matrix by itself. "
            "best: error feedback block by block, among quantized neighbours; wants -f. The size is the same.",
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
