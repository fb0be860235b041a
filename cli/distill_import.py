"""`gguforge distill import`: DistillKit's captured log-probabilities as soft targets."""

from __future__ import annotations

import click

from gguforge.cli.common import quiet_option


@click.command("import")
@click.argument("folder", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="The folder for the targets.")
@click.option("--tokenizer", type=click.Path(), help="The teacher's tokenizer: a GGUF file or a checkpoint's folder.")
@quiet_option
def command(folder: str, output: str, tokenizer: str | None, quiet: bool) -> None:
    """Turn FOLDER, what DistillKit captured (parquet files and compression_config.yaml), into top-k targets.

    \b
    Examples:
      gguforge distill import captured/ --tokenizer teacher/ -o targets/
    """
    from gguforge.distill.distillkit import import_targets

    targets = import_targets(folder, output, tokenizer)
    if not quiet:
        each = targets.nbytes / max(1, targets.tokens)
        click.echo(f"{output}: {len(targets)} texts, {targets.tokens:,} tokens, {each:.1f} bytes a token")
