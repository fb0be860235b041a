"""`gguforge distill export`: soft targets in DistillKit's form."""

from __future__ import annotations

import click

from gguforge.cli.common import quiet_option


@click.command("export")
@click.argument("targets", type=click.Path())
@click.option("-o", "--output", type=click.Path(), required=True, help="The folder for the parquet files.")
@quiet_option
def command(targets: str, output: str, quiet: bool) -> None:
    """Write TARGETS, sampled or top-k ones, as parquet files and compression_config.yaml for DistillKit.

    \b
    Examples:
      gguforge distill export targets/ -o captured/
    """
    from gguforge.distill.distillkit import export_targets
    from gguforge.distill.targets import open_targets

    opened = open_targets(targets)
    config = export_targets(opened, output)
    if not quiet:
        click.echo(
            f"{output}: {len(opened)} texts, {config.k} ids a row; d: {config.d}, k: {config.k}, exact_k: {config.k}"
        )
