"""`gguforge quantize --target-size` and its like: types chosen for a size, by measured damage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gguforge.cli.chunk_bar import stages_bar
from gguforge.cli.common import gathered, in_words

if TYPE_CHECKING:
    from gguforge.cli.writing import Writing
    from gguforge.quant.quantize import Guide
    from gguforge.runtime.sizing import Measuring, Rival, Sized


@dataclass(frozen=True)
class Sizing:
    """How large the file shall be; at most one of the first three is given.

    Attributes:
        target_size: bytes of the file, in words.
        target_bpw: bits per weight.
        fit: bytes of memory of the machine that will run it, in words.
        fit_context, fit_cache: tokens of context there, and the type of its KV cache.
        size_text: a text to measure on.
        size_chunks: chunks of it for the choice, and as many for the verification.
    """

    target_size: str | None
    target_bpw: float | None
    fit: str | None
    fit_context: int
    fit_cache: str
    size_text: str | None
    size_chunks: int

    @property
    def asked(self) -> bool:
        """Whether the size decides, and no preset."""
        return any(one is not None for one in (self.target_size, self.target_bpw, self.fit))

    @property
    def label(self) -> str:
        """What was asked for, as a word for names."""
        if self.target_bpw is not None:
            return f"{self.target_bpw:g}bpw"
        return (self.target_size or f"fit-{self.fit}").replace(" ", "")

    def measuring(self, output: str, workers: int | None) -> Measuring:
        """How to measure; the sweep is kept beside the output."""
        from gguforge.runtime.sizing import Measuring

        assert self.size_text is not None
        path = Path(output)
        return Measuring(
            self.size_text,
            chunks=self.size_chunks,
            workers=workers,
            store=path.with_name(f"{path.name}.sensitivity.json"),
            scratch=path.absolute().parent,
        )

    def check(self, preset: str | None) -> None:
        """Whether the options belong together.

        Raises:
            UsageError: they do not.
        """
        asked = sum(one is not None for one in (preset, self.target_size, self.target_bpw, self.fit))
        if asked != 1:
            raise click.UsageError("Give one of --type, --target-size, --target-bpw and --fit.")
        if self.asked and self.size_text is None:
            raise click.UsageError("A size needs a text to measure on: --measure-on TEXT.")


sizing_options = gathered(
    Sizing,
    "sizing",
    click.option("--target-size", metavar="SIZE", help="Choose the types for a file of at most so many bytes: 3.5GB."),
    click.option(
        "--target-bpw",
        type=click.FloatRange(min=0.5, max=32),
        metavar="BPW",
        help="The same, as bits per weight: 4.25.",
    ),
    click.option("--fit", metavar="SIZE", help="The same, for a machine with so much memory: 8GB, all needs counted."),
    click.option(
        "--ctx",
        "fit_context",
        type=click.IntRange(1),
        default=4096,
        show_default=True,
        help="Tokens of context for --fit.",
    ),
    click.option("--cache-type", "fit_cache", default="f16", show_default=True, help="Type of the KV cache for --fit."),
    click.option("--measure-on", "size_text", type=click.Path(), help="A text to choose and to verify the types on."),
    click.option(
        "--measure-chunks",
        "size_chunks",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Chunks of 512 tokens for choosing the types, and as many more for verifying them.",
    ),
)


TUNED_ROOM = 512  # bytes that the metadata of a tuned file may take beyond those of a stamped one


def sized_plan(model: str, output: str, sizing: Sizing, guide: Guide | None, writing: Writing) -> Rival:
    """The best file of that size, metadata included, as it was measured; with a remark on that."""
    from gguforge.quant.files import check_target
    from gguforge.runtime.sizing import fit_size

    check_target(Path(output), writing.overwrite)
    how = sizing.measuring(output, writing.workers)
    with stages_bar(writing.quiet) as tell:
        found = fit_size(model, budget(model, sizing) - room(model, sizing, writing), how, guide=guide, progress=tell)
    if not writing.quiet:
        shares = memory_shares(model, sizing, found.best.plan.size)
        if shares:
            click.echo("memory: " + ", ".join(f"{name} {in_words(n)}" for name, n in shares.items()), err=True)
        click.echo(remark(found), err=True)
    return found.best


def room(model: str, sizing: Sizing, writing: Writing) -> int:
    """Bytes that the facts of its making take in a file."""
    from gguforge.quant.provenance import Measurement
    from gguforge.quant.quantize import plan_of_file
    from gguforge.quant.splits import read_model

    assert sizing.size_text is not None
    plan = plan_of_file(read_model(model))
    hashed = "0" * 64
    like = Measurement(0.0, 0.0, Path(sizing.size_text).name, hashed, 0, 0, 0, Path(model).name, hashed)
    tuned: bool = click.get_current_context().params["quality"] != "exact"
    return len(writing.stamped(plan, like).header) - len(plan.header) + plan.alignment + TUNED_ROOM * tuned


def print_forecast(model: str, sizing: Sizing, guide: Guide | None, writing: Writing) -> None:
    """What choosing the types would take; one chunk of text is read to know the pace."""
    from gguforge.runtime.sizing import forecast

    most = budget(model, sizing)
    shares = memory_shares(model, sizing, most)
    found = forecast(model, most - room(model, sizing, writing), sizing.measuring(model, None), guide)
    if writing.as_json:
        click.echo(json.dumps({"budget": most, **vars(found)} | ({"fit": shares} if shares else {})))
        return
    click.echo(f"budget       {most:,} bytes")
    for name, nbytes in shares.items():
        click.echo(f"  {name:<11}{in_words(nbytes)}")
    click.echo(f"evaluations  {found.evaluations}, each of {sizing.size_chunks} chunks")
    click.echo(f"time         about {found.seconds / 60:.1f} minutes")
    click.echo(f"memory       about {in_words(found.memory)}")
    click.echo(f"disk         {in_words(found.disk)} meanwhile")


def memory_shares(model: str, sizing: Sizing, weights: int) -> dict[str, int]:
    """Of `--fit`, bytes for the weights and for what running the model takes besides; empty without it."""
    from gguforge.runtime.memory import PROCESS, buffers

    if sizing.fit is None:
        return {}
    need = buffers(model, sizing.fit_context, sizing.fit_cache)
    return {"weights": weights, "KV cache": need.cache, "compute": need.compute, "process": PROCESS}


def budget(model: str, sizing: Sizing) -> int:
    """Bytes that the file may have.

    Raises:
        InputError: a size is no size, or the memory holds no weights beside the context.
    """
    from gguforge.quant.errors import InputError
    from gguforge.quant.quantize import plan_of_file
    from gguforge.quant.splits import parse_size, read_model

    if sizing.target_size is not None:
        return parse_size(sizing.target_size)
    if sizing.target_bpw is not None:
        plan = plan_of_file(read_model(model))
        return len(plan.header) + int(plan.elements * sizing.target_bpw / 8)
    from gguforge.runtime.memory import buffers

    assert sizing.fit is not None
    memory, need = parse_size(sizing.fit), buffers(model, sizing.fit_context, sizing.fit_cache)
    if need.total >= memory:
        raise InputError(
            "the context alone takes more memory than that", path=model, expected=f"more than {in_words(need.total)}",
            found=in_words(memory), remedy="Give a smaller --ctx, or a smaller --cache-type such as q8_0.",
        )  # fmt: skip
    return memory - need.total


def remark(found: Sized) -> str:
    """One line: what was written and what it was measured against."""
    chosen = f"chosen types: KLD {found.chosen.divergence:.5f} in {in_words(found.chosen.plan.size)}"
    if found.everything:
        return f"{chosen}; the largest types of all tensors fit"
    if not found.rivals:
        return f"{chosen}; no preset is that small"
    rival = found.rivals[0]
    line = f"{chosen}; best preset that fits: {rival.name}, KLD {rival.divergence:.5f} in {in_words(rival.plan.size)}"
    return line if found.best is found.chosen else f"{line}, which is better and is written"
