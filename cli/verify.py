"""`gguforge verify`: is a model file what its receipt says, and what its source gives?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.common import progress_bar, quiet_option
from gguforge.quant.errors import GGUForgeError, printable

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan
    from gguforge.quant.reader import GGUFFile
    from gguforge.quant.verification import Difference

SHOWN = 20  # differences that are printed


@click.command("verify")
@click.argument("model", type=click.Path())
@click.option("--source", type=click.Path(), help="The GGUF file or the checkpoint folder that MODEL was made from.")
@click.option("--imatrix", type=click.Path(), help="The importance matrix that MODEL was made with.")
@click.option(
    "--prune-layers",
    "layers",
    multiple=True,
    metavar="N,N,...",
    help="The layers of --source that MODEL was made without.  [default: what the receipt says]",
)
@click.option("--all", "every", is_flag=True, help="Encode all of --source again, not a slab of each tensor.")
@click.option("--workers", type=click.IntRange(1, 256), help="Processes to use.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def command(
    model: str,
    source: str | None,
    imatrix: str | None,
    layers: tuple[str, ...],
    every: bool,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check MODEL against its receipt, and with --source against what it was made from.

    The receipt MODEL.json lies beside files that `quantize` and `convert` have written. With --source the tensors are
    encoded again and compared byte for byte: some rows of each, or with --all every row. Exits with 1 if anything
    differs.

    \b
    Examples:
      gguforge verify model-q4_k_m.gguf
      gguforge verify model-q4_k_m.gguf --source model-f16.gguf --all
      gguforge verify model-q4_k_m.gguf --source path/to/checkpoint
    """
    from gguforge.quant.splits import read_model

    if source is None and (every or layers or imatrix is not None):
        raise click.UsageError("--all, --imatrix and --prune-layers need --source.")
    file = read_model(model)
    result: dict[str, Any] = {"model": model}
    differences = _check_receipts(file, source is not None, result, quiet)
    if source is not None:
        differences += _check_source(file, source, imatrix, layers, every, workers, result, quiet)
    if as_json:
        result["differences"] = [{"tensor": found.tensor, "what": found.what} for found in differences]
        click.echo(json.dumps(result))
    elif not differences and not quiet:
        click.echo("\n".join(_summary(result)))
    if differences and as_json:
        click.get_current_context().exit(1)
    if differences:
        raise GGUForgeError(_list(differences), path=model)


def _check_receipts(file: GGUFFile, optional: bool, result: dict[str, Any], quiet: bool) -> list[Difference]:
    """Compare every file of the model with its receipt."""
    from gguforge.quant.errors import InputError
    from gguforge.quant.receipt import read_receipt, receipt_path
    from gguforge.quant.verification import check_facts, check_hashes

    found, digests, measured = [], [], list[str]()
    with progress_bar(file.size, "receipt", quiet) as progress:
        for part in file.splits or (file,):
            receipt = read_receipt(part.path)
            if receipt is None and optional:
                continue
            if receipt is None:
                raise InputError(
                    "no receipt", path=receipt_path(part.path), remedy="Compare with the --source instead."
                )
            found += check_hashes(part, receipt, progress or (lambda _: None)) + check_facts(part, receipt)
            measured += [one.words() for one in receipt.measured]
            digests.append(receipt.digest)
    if digests:
        result |= {"tensors": len(file.tensors), "digests": digests, "measured": measured}
    return found


def _check_source(
    file: GGUFFile,
    source: str,
    imatrix: str | None,
    layers: tuple[str, ...],
    every: bool,
    workers: int | None,
    result: dict[str, Any],
    quiet: bool,
) -> list[Difference]:
    """Compare the model with what it was made from."""
    from gguforge.quant.imatrix import read_imatrix
    from gguforge.quant.pruning import parse_layers
    from gguforge.quant.quantize import Guide
    from gguforge.quant.receipt import read_receipt
    from gguforge.quant.verification import check_errors, check_source, chosen, expected_plan

    guide = None if imatrix is None else Guide.from_matrix(read_imatrix(imatrix), imatrix)
    receipt = read_receipt(file.path)
    pruned = parse_layers(layers or (receipt.settings.get("layers", ()) if receipt is not None else ()))
    weights = None if guide is None else guide.weights
    plan, differences = expected_plan(file, source_plan(source), weights, pruned)
    total = len(chosen(plan, every))
    with progress_bar(total, "source", quiet) as progress:
        differences += check_source(file, plan, every=every, workers=workers, progress=progress or (lambda _: None))
    if not differences:
        receipts = [found for part in file.splits or (file,) if (found := read_receipt(part.path)) is not None]
        differences += check_errors(file, plan, receipts)
    result |= {"source": source, "compared_tensors": len(plan.tensors), "compared_slabs": total, "all": every}
    return differences


def source_plan(source: str) -> Plan:
    """The tensors of a GGUF file or of a checkpoint folder, under their GGUF names."""
    from gguforge.convert import plan
    from gguforge.quant.quantize import plan_of_file
    from gguforge.quant.splits import read_model

    if Path(source).is_dir():
        return plan(source, warn=lambda _: None)
    return plan_of_file(read_model(source))


def _summary(result: dict[str, Any]) -> list[str]:
    lines = []
    if "digests" in result:
        lines.append(f"receipt: {result['tensors']} tensors agree, digest {', '.join(result['digests'])}")
        lines += [f"receipt: {line}" for line in result["measured"]]
    if "source" in result:
        share = "every row" if result["all"] else f"{result['compared_slabs']} slabs, one of each"
        lines.append(f"source: {result['compared_tensors']} tensors agree ({share})")
    return [printable(f"{result['model']}: {line}") for line in lines]


def _list(differences: list[Difference]) -> str:
    """All differences in one line, or the first ones."""
    texts = [f"{found.tensor} {found.what}".strip() for found in differences[:SHOWN]]
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return f"{len(differences)} difference{'s' * (len(differences) > 1)}: " + "; ".join(texts) + more
