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
from gguforge.cli.common import Command, gathered

if TYPE_CHECKING:
    from gguforge.cli.writing import Writing
    from gguforge.quant.plan import Plan

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
        if self.quality == "lossless" or writing.dry_run:
            yield plan
            return
        folder = Path(f"{output}.tune")
        yield self._tuned(plan, model, output, folder, writing)
        shutil.rmtree(folder)

    def _tuned(self, plan: Plan, model: str, output: str, folder: Path, writing: Writing) -> Plan:
        from gguforge.quant.files import check_target
        from gguforge.runtime.tune import tune
        from gguforge.runtime.tuning_text import random_chunks, tuning_chunks, tuning_metadata

        check_target(Path(output), writing.overwrite)
        if self.text is None:
            chunks = random_chunks(model)
        else:
            chunks = tuning_chunks(model, self.text, self.text_chunks)
            plan = replace(plan, metadata={**plan.metadata, **tuning_metadata(self.text, len(chunks))})
        how = {"sequential": self.quality == "best", "guided": self.text is None}
        try:
            with chunk_bar("tune", writing.quiet) as bar:
                return tune(plan, chunks, folder, **how, threads=writing.workers, progress=bar)
        except (KeyboardInterrupt, SystemExit):
            if folder.exists():
                click.echo(f"kept what was done in {folder}; the same command goes on from there", err=True)
            raise


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
