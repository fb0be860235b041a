"""`gguforge calibrate`: text through a model into an importance matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.chunk_bar import chunk_bar
from gguforge.cli.common import chunk_options, quiet_option, threads_option, warn

if TYPE_CHECKING:
    from gguforge.quant.imatrix import ImportanceMatrix

SHOWN_EXPERTS = 8


@click.command(
    "calibrate", epilog="A name that ends in .dat chooses llama-imatrix's older format, which keeps no hashes."
)
@click.argument("model", type=click.Path(), required=False)
@click.option("-f", "--file", "text", type=click.Path(), help="The text; .jsonl holds conversations, one a line.")
@click.option("-o", "--output", type=click.Path(), help="The file to write.  [default: MODEL.imatrix.gguf]")
@chunk_options(16)
@click.option("--process-output", is_flag=True, help="Collect for output.weight as well.")
@click.option("--merge", multiple=True, type=click.Path(), help="Add this importance matrix; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on from what a stopped run left, or add chunks to a finished one.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print what was collected, by tensor and expert, as JSON.")
@quiet_option
def command(
    model: str | None,
    text: str | None,
    output: str | None,
    chunks: int | None,
    context: int,
    process_output: bool,
    merge: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read TEXT through the GGUF file MODEL and write its importance matrix, as llama-imatrix does.

    Without MODEL, add up the matrices given with --merge; without an output as well, only say what they cover.

    \b
    Examples:
      gguforge calibrate model-f16.gguf -f calibration.txt -o imatrix.gguf
      gguforge calibrate model-f16.gguf -f chats.jsonl --chunks 200
      gguforge calibrate model-f16.gguf -f calibration.txt -o imatrix.gguf --resume
      gguforge calibrate --merge english.gguf --merge code.gguf -o both.gguf
      gguforge calibrate --merge imatrix.gguf --json
    """
    if (model is None) != (text is None):
        raise click.UsageError("MODEL and -f TEXT belong together.")
    if model is None and not merge:
        raise click.UsageError("Give MODEL and -f TEXT, or importance matrices with --merge.")
    if resume and merge:
        raise click.UsageError("--resume and --merge exclude each other: merge when the run is done.")
    from gguforge.quant.files import check_target
    from gguforge.quant.imatrix import merge as added
    from gguforge.quant.imatrix import read_imatrix, write_imatrix

    matrices = [read_imatrix(path) for path in merge]
    if model is not None and text is not None:
        output = output or str(Path(model).with_suffix(".imatrix.gguf"))
        settings = {"context": context, "chunks": chunks, "process_output": process_output, "threads": threads}
        matrices.append(_calibrate(model, text, output, quiet, settings | {"resume": resume, "overwrite": overwrite}))
    elif output is not None:
        check_target(Path(output), overwrite)
    for line in counted_twice(matrices, (*merge, text or "")):
        warn(line)
    matrix = added(matrices, (*merge, output or "")) if merge else matrices[0]
    if output is not None and merge:
        write_imatrix(matrix, output, overwrite=overwrite or model is not None)
    if as_json:
        click.echo(json.dumps({"output": output, **described(matrix)}))
    elif not quiet:
        click.echo(report(matrix, output))


def _calibrate(model: str, text: str, output: str, quiet: bool, settings: dict[str, Any]) -> ImportanceMatrix:
    """Run, with a bar, and say what an interrupted run left."""
    from gguforge.runtime.calibrate import calibrate, partial_path

    try:
        with chunk_bar("calibrate", quiet) as bar:
            return calibrate(model, text, output, progress=bar, **settings)
    except (KeyboardInterrupt, SystemExit):
        if partial_path(output).exists():
            click.echo(f"kept what was done in {partial_path(output)}; go on with --resume", err=True)
        raise


def counted_twice(matrices: Sequence[ImportanceMatrix], names: Sequence[str]) -> list[str]:
    """One line for each two matrices, called by their names, that the same text went into."""
    first: dict[str, str] = {}
    found: dict[str, None] = {}
    for matrix, name in zip(matrices, names, strict=False):
        for digest in matrix.text_hashes:
            if digest in first:
                found[f"the same text went into {first[digest]} and {name}: it counts twice"] = None
            first.setdefault(digest, name)
    return list(found)


def described(matrix: ImportanceMatrix) -> dict[str, Any]:
    """The facts that `--json` prints."""
    return {
        "tensors": len(matrix.entries),
        "chunks": matrix.chunk_count,
        "chunk_size": matrix.chunk_size,
        "datasets": list(matrix.datasets),
        "text_sha256": list(matrix.text_hashes),
        "coverage": [
            {"tensor": c.name, "experts": c.experts, "unused": list(c.unused), "least": c.least, "most": c.most}
            | ({"tokens": matrix.entries[c.name].counts.tolist()} if c.experts > 1 else {})
            for c in matrix.coverage()
        ],
    }


def report(matrix: ImportanceMatrix, output: str | None) -> str:
    """For people: one line, and one more for each tensor with experts that no token reached."""
    size = f"{len(matrix.entries)} tensors, {matrix.chunk_count} chunks of {matrix.chunk_size} tokens"
    lines = [f"{output}: {size}" if output else size]
    for found in matrix.coverage():
        if found.unused:
            shown = ", ".join(map(str, found.unused[:SHOWN_EXPERTS])) + (", ..." * (len(found.unused) > SHOWN_EXPERTS))
            lines.append(f"{found.name}: {len(found.unused)} of {found.experts} experts saw no token: {shown}")
        elif found.experts > 1:
            lines.append(f"{found.name}: {found.experts} experts, each saw {found.least} to {found.most} tokens")
    return "\n".join(lines)
