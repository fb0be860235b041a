"""`gguforge compare`: several files of one model, what each costs and what each keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.chunk_bar import stages_bar
from gguforge.cli.common import chunk_options, in_words, quiet_option, table, threads_option, warn

if TYPE_CHECKING:
    from gguforge.runtime.compare import Candidate, Report


@click.command("compare", epilog="KLD is the Kullback-Leibler divergence from the reference, in nats a token.")
@click.argument("models", nargs=-1, required=True, type=click.Path(), metavar="MODEL...")
@click.option("--against", required=True, type=click.Path(), help="The model that all were made of: F16, BF16 or F32.")
@click.option("-f", "--file", "text", required=True, type=click.Path(), help="Held-out text; .jsonl: conversations.")
@click.option("--report", "page", type=click.Path(), help="Write a page with plots, maps and answers.")
@click.option("--prompt", "prompts", multiple=True, help="Ask this of every model, for the report; may be repeated.")
@click.option("--map-chunks", type=click.IntRange(0), default=2, show_default=True,
              help="Chunks for the report's map of layers and kinds of tensors; 0 for no map.")  # fmt: skip
@chunk_options(4)
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace the report if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def command(
    models: tuple[str, ...],
    against: str,
    text: str,
    page: str | None,
    prompts: tuple[str, ...],
    map_chunks: int,
    chunks: int | None,
    context: int,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure several GGUF files of one model on TEXT: size, divergence, and which is worth its bytes.

    \b
    Examples:
      gguforge compare m-Q4_K_M.gguf m-Q3_K_M.gguf m-Q2_K.gguf --against m-F16.gguf -f held-out.txt
      gguforge compare m-*.gguf --against m-F16.gguf -f held-out.txt --report m.html --prompt "What is GGUF?"
    """
    from gguforge.quant.files import check_target
    from gguforge.runtime.compare import compare

    if page is not None:
        from gguforge.runtime.charts import matplotlib

        check_target(Path(page), overwrite)  # what cannot be written is better known before the work
        matplotlib()
    elif prompts:
        raise click.UsageError("Answers are shown in the report: pass --report FILE.")
    with stages_bar(quiet) as tell:
        found = compare(
            models,
            against,
            text,
            context=context,
            chunks=chunks,
            part_chunks=map_chunks if page is not None else 0,
            prompts=prompts,
            threads=threads,
            scratch=None if page is None else Path(page).absolute().parent,
            progress=tell,
        )
    if page is not None:
        write_page(found, Path(page), overwrite)
    for warning in overlap_warnings(found):
        warn(warning)
    click.echo(json.dumps(described(found)) if as_json else shown(found))
    if page is not None and not quiet:
        click.echo(f"{page}: the report", err=True)


def overlap_warnings(found: Report) -> list[str]:
    """One line for each model that was made with what it is measured on."""
    from gguforge.cli.evaluate import overlap_warning
    from gguforge.runtime.overlap import find_calibration

    told = [(one, overlap_warning(one.evaluation, str(found.text), find_calibration(one.path)))
            for one in found.candidates]  # fmt: skip
    return [f"{one.path.name}: {warning}" for one, warning in told if warning]


def write_page(found: Report, path: Path, overwrite: bool) -> None:
    """Write the report, whole or not at all."""
    from gguforge.quant.files import replacing
    from gguforge.runtime.report import page

    data = page(found).encode("utf-8")
    with replacing(path, len(data), overwrite) as part, open(part, "r+b") as file:
        file.write(data)


def shown(found: Report) -> str:
    """The table for people."""
    best = {one.path for one in found.frontier()}
    rows = [["", "type", "size", "bpw", "mean KLD", "", "99.9 % KLD", "same top", "perplexity"]]
    rows += [_row(one, one.path in best) for one in found.candidates]
    return table(rows, right=(2, 3, 4, 6, 7, 8)) + "\n(* no smaller file here has a lower KLD)"


def _row(one: Candidate, best: bool) -> list[str]:
    both = one.evaluation.comparison
    assert both is not None
    return [
        f"{one.path.name}{' *' if best else ''}", one.type, in_words(one.nbytes), f"{one.plan.bits_per_weight:.2f}",
        f"{both.mean.value:.5f}", f"± {both.mean.error:.5f}", f"{both.quantiles[0.999].value:.4f}",
        f"{100 * both.same_top.value:.2f} %", f"{one.evaluation.perplexity.value:.4f}",
    ]  # fmt: skip


def described(found: Report) -> dict[str, Any]:
    """The facts that `--json` prints; divergences in nats."""
    from gguforge.cli.evaluate import described as evaluation

    best = {one.path for one in found.frontier()}
    return {
        "reference": str(found.reference),
        "text": str(found.text),
        "models": [
            {
                **evaluation(one.evaluation, str(one.path), str(found.text), str(found.reference)),
                "type": one.type,
                "bytes": one.nbytes,
                "bits_per_weight": round(one.plan.bits_per_weight, 4),
                "frontier": one.path in best,
                "parts": [
                    {"layer": layer, "kind": kind, "kld_mean": value} for (layer, kind), value in one.parts.items()
                ],
                "answers": ["".join(piece.text for piece in answer) for answer in one.answers],
            }
            for one in found.candidates
        ],
    }
