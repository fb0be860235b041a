"""`gguforge convert`: a Hugging Face checkpoint into a GGUF file of any type, in one pass."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import in_words, plan_summary, print_dry_run, print_fallbacks, progress_bar, writing_options

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan

TYPES = (
    "A type is F32, F16, BF16, AUTO (the 16-bit type of the stored weights) or a preset such as Q4_K_M, in any case."
)


@click.command("convert", epilog=TYPES)
@click.argument("checkpoint", type=click.Path())
@click.option("-t", "--type", "type_name", default="AUTO", show_default=True, help="The type or preset, e.g. Q4_K_M.")
@click.option("--model-name", help="The model's name, instead of the one the checkpoint gives.")
@click.option("--pre", help="llama.cpp's name of the pre-tokenizer, where tokenizer.json does not tell.")
@writing_options
def command(
    checkpoint: str,
    type_name: str,
    model_name: str | None,
    pre: str | None,
    output: str | None,
    overwrite: bool,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert the Hugging Face checkpoint in the folder CHECKPOINT.

    Reads config.json, *.safetensors and the tokenizer; torch and transformers are not needed. Quantized types are made
    straight from the stored weights. Without -o, the file gets the model's name and type, in the current folder.

    \b
    Examples:
      gguforge convert path/to/checkpoint --type Q4_K_M -o model.gguf
      gguforge convert path/to/checkpoint --type BF16
      gguforge convert path/to/checkpoint --type Q6_K --dry-run
    """
    from gguforge.convert import default_file_name, plan
    from gguforge.quant.writer import write

    remarks: list[str] = []
    made = plan(checkpoint, type_name, pre=pre, model_name=model_name, warn=remarks.append)
    label = file_type_name(made)
    output = output or default_file_name(made, label)
    for remark in remarks:
        click.echo(f"warning: {remark}", err=True)
    result = {"output": output, "type": label, **plan_summary(made), "warnings": remarks}
    if dry_run:
        if as_json:
            click.echo(json.dumps(result | needs(made, output, workers)))
        else:
            print_dry_run(made, output, workers)
    else:
        start = time.perf_counter()
        with progress_bar(made.size, label, quiet) as progress:
            write(made, output, workers=workers, overwrite=overwrite, progress=progress)
        seconds = time.perf_counter() - start
        if as_json:
            click.echo(json.dumps(result | {"seconds": round(seconds, 3)}))
        elif not quiet:
            click.echo(f"{output}: {in_words(made.size)}, {made.bits_per_weight:.2f} bits per weight, {seconds:.1f} s")
    if not quiet:
        print_fallbacks(made)


def file_type_name(plan: Plan) -> str:
    """The name of a plan's `general.file_type`, as `--type` takes it: Q4_K_M, BF16."""
    from gguforge.quant.constants import LlamaFileType

    number = plan.metadata["general.file_type"].value
    assert isinstance(number, int)
    name: str = LlamaFileType(number).name
    return name.removeprefix("ALL_").removeprefix("MOSTLY_")


def needs(plan: Plan, output: str, workers: int | None) -> dict[str, Any]:
    """Memory and disk that executing a plan takes, in bytes, for `--dry-run --json`."""
    import shutil
    from pathlib import Path

    from gguforge.quant.writer import peak_memory

    folder = Path(output).absolute().parent
    free = shutil.disk_usage(folder).free if folder.is_dir() else None
    return {"memory_bytes": peak_memory(plan, workers), "disk_bytes": plan.size, "disk_free_bytes": free}
