"""`gguforge convert`: a Hugging Face checkpoint into a GGUF file of any type, in one pass."""

from __future__ import annotations

import json
import time

import click

from gguforge.cli.common import in_words, plan_summary, print_dry_run, print_fallbacks, progress_bar, writing_options


@click.command(
    "convert",
    epilog="A type is F32, F16, BF16, AUTO (the stored weights' own 16-bit type) or a preset such as Q4_K_M, in any case.",
)
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
    label = file_type_name(int(str(made.metadata["general.file_type"].value)))
    output = output or default_file_name(made, label)
    for remark in remarks:
        click.echo(f"warning: {remark}", err=True)
    if dry_run and not as_json:
        print_dry_run(made, output, workers)
    start = time.perf_counter()
    if not dry_run:
        with progress_bar(made.size, label, quiet) as progress:
            write(made, output, workers=workers, overwrite=overwrite, progress=progress)
    seconds = time.perf_counter() - start
    if not quiet:
        print_fallbacks(made)
    if as_json:
        result = {"output": output, "type": label, **plan_summary(made), "warnings": remarks}
        click.echo(json.dumps(result | ({} if dry_run else {"seconds": round(seconds, 3)})))
    elif not dry_run and not quiet:
        click.echo(f"{output}: {in_words(made.size)}, {made.bits_per_weight:.2f} bits per weight, {seconds:.1f} s")


def file_type_name(number: int) -> str:
    """The name of a `general.file_type`, as `--type` takes it.

    >>> file_type_name(15)
    'Q4_K_M'
    """
    from gguf.constants import LlamaFileType

    return LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_")
