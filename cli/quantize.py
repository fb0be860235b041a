"""`gguforge quantize`: a GGUF file into a smaller one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from gguforge.cli.common import in_words, plan_summary, print_dry_run, print_fallbacks, progress_bar, writing_options


@click.command("quantize", epilog="A type is a preset of llama.cpp by name or number, in any case: Q4_K_M, q6_k, 15.")
@click.argument("model", type=click.Path())
@click.option("-t", "--type", "preset", required=True, help="The preset, e.g. Q4_K_M.")
@click.option(
    "--allow-requantize", is_flag=True, help="Accept a model that is quantized already; it loses quality twice."
)
@writing_options
def command(
    model: str,
    preset: str,
    allow_requantize: bool,
    output: str | None,
    overwrite: bool,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize the GGUF file MODEL, byte for byte as llama-quantize does.

    \b
    Examples:
      gguforge quantize model-f16.gguf --type Q4_K_M -o model-q4_k_m.gguf
      gguforge quantize model-bf16.gguf --type Q6_K --workers 4
      gguforge quantize model-f16.gguf --type Q2_K --dry-run
    """
    from gguforge.quant.presets import find_preset
    from gguforge.quant.quantize import plan_of_file, retype
    from gguforge.quant.reader import read_gguf
    from gguforge.quant.writer import write

    chosen = find_preset(preset)
    plan = retype(plan_of_file(read_gguf(model)), chosen, allow_requantize=allow_requantize)
    output = output or default_output(model, chosen.name)
    if dry_run and not as_json:
        print_dry_run(plan, output, workers)
    start = time.perf_counter()
    if not dry_run:
        with progress_bar(plan.size, chosen.name, quiet) as progress:
            write(plan, output, workers=workers, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - start
    if not quiet:
        if chosen.name == "Q2_K_S":
            click.echo("Q2_K_S without an importance matrix loses much quality; llama-quantize refuses it.", err=True)
        print_fallbacks(plan)
    if as_json:
        click.echo(
            json.dumps(
                {"output": output, "type": chosen.name, **plan_summary(plan)}
                | ({} if dry_run else {"seconds": round(seconds, 3)})
            )
        )
    elif not dry_run and not quiet:
        click.echo(f"{output}: {in_words(plan.size)}, {plan.bits_per_weight:.2f} bits per weight, {seconds:.1f} s")


def default_output(model: str, preset: str) -> str:
    """A name beside the input: its own, with the type in place of the old one.

    >>> default_output("dir/tiny-F16.gguf", "Q4_K_M")
    'dir/tiny-Q4_K_M.gguf'
    """
    path = Path(model)
    stem, _, last = path.stem.rpartition("-")
    known = last.upper() in ("F16", "BF16", "F32")
    return str(path.with_name(f"{stem if known and stem else path.stem}-{preset}.gguf"))
