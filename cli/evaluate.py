"""`gguforge evaluate`: a model's perplexity on a text, and how far it is from a reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from gguforge.cli.chunk_bar import chunk_bar
from gguforge.cli.common import chunk_options, quiet_option, table, threads_option, warn

if TYPE_CHECKING:
    from gguforge.runtime.divergence import Comparison, Estimate
    from gguforge.runtime.evaluate import Evaluation
    from gguforge.runtime.overlap import Calibration

QUANTILE_NAMES = {0.5: "median", 0.9: "90 %", 0.95: "95 %", 0.99: "99 %", 0.999: "99.9 %", 1.0: "maximum"}


@click.command("evaluate", epilog="KLD is the Kullback-Leibler divergence from the reference, in nats a token.")
@click.argument("model", type=click.Path())
@click.option("-f", "--file", "text", type=click.Path(), help="The text; .jsonl holds conversations, one a line.")
@click.option("--against", type=click.Path(), help="The reference: a GGUF file, or what --save-base wrote.")
@click.option("--save-base", type=click.Path(), help="Write the log-probabilities here, for --against.")
@click.option("--imatrix", type=click.Path(), help="Warn when TEXT overlaps the text of this importance matrix.")
@chunk_options(4)
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace the file of --save-base if it exists.")
@click.option("--receipt", is_flag=True, help="Note the divergence in the receipt MODEL.json; wants -f and --against.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def command(
    model: str,
    text: str | None,
    against: str | None,
    save_base: str | None,
    imatrix: str | None,
    chunks: int | None,
    context: int,
    threads: int | None,
    overwrite: bool,
    receipt: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the GGUF file MODEL on TEXT: perplexity, and with --against how far it is from a reference.

    \b
    Examples:
      gguforge evaluate model-q4_k_m.gguf -f wiki.test.raw
      gguforge evaluate model-q4_k_m.gguf -f wiki.test.raw --against model-f16.gguf
      gguforge evaluate model-f16.gguf -f wiki.test.raw --save-base model-f16.kld
      gguforge evaluate model-q4_k_m.gguf --against model-f16.kld --json
      gguforge evaluate model-q4_k_m.gguf -f wiki.test.raw --against model-f16.gguf --receipt
    """
    if text is None and against is None:
        raise click.UsageError("Give a text with -f.")
    if receipt and (text is None or against is None):
        raise click.UsageError("--receipt wants -f TEXT and --against.")
    from gguforge.runtime.evaluate import evaluate
    from gguforge.runtime.overlap import find_calibration

    calibration = find_calibration(model, imatrix)
    with chunk_bar("evaluate", quiet) as bar:
        found = evaluate(
            model,
            text,
            against=against,
            save_base=save_base,
            context=context,
            chunks=chunks,
            threads=threads,
            overwrite=overwrite,
            calibration=frozenset() if calibration is None else calibration.fingerprint,
            progress=lambda done, total, perplexity: bar(done, total, f"perplexity {perplexity:.4f}"),
        )
    warning = overlap_warning(found, text, calibration)
    if warning:
        warn(warning)
    if receipt:
        from gguforge.runtime.measured import measurement, note

        assert text is not None
        assert against is not None
        note(measurement(found, text, against), model)
    click.echo(json.dumps(described(found, model, text, against)) if as_json else report(found))


def overlap_warning(found: Evaluation, text: str | None, calibration: Calibration | None) -> str:
    """One line when the model was calibrated with what it is measured on."""
    from gguforge.runtime.overlap import same_name

    if found.overlap:
        return (
            f"{100 * found.overlap:.1f} % of this text's passages are in the calibration text as well: "
            "the model looks better here than it is. Measure on another text."
        )
    if calibration is None or text is None:
        return ""
    if found.text_sha256 in calibration.hashes:
        return "this very text served to calibrate the model or to choose its types; measure on another one."
    if same_name(text, calibration):
        return "a text of the same name served to calibrate the model or to choose its types; measure on another one."
    return ""


def described(found: Evaluation, model: str, text: str | None, against: str | None) -> dict[str, Any]:
    """The facts that `--json` prints; probabilities as shares, divergences in nats."""
    facts: dict[str, Any] = {
        "model": model,
        "text": text,
        "text_sha256": found.text_sha256 or None,
        "against": against,
        "chunks": found.chunks,
        "context": found.context,
        "positions": found.positions,
        "perplexity": vars(found.perplexity),
        "calibration_overlap": found.overlap,
    }
    if found.comparison is None:
        return facts
    both = found.comparison
    return facts | {
        "reference_perplexity": vars(both.base_perplexity),
        "log_perplexity_ratio": vars(both.log_ratio),
        "correlation": both.correlation,
        "kld_mean": vars(both.mean),
        "kld_quantiles": {str(share): vars(estimate) for share, estimate in both.quantiles.items()},
        "same_top": vars(both.same_top),
        "probability_change_rms": vars(both.rms_change),
        "probability_change_mean": vars(both.mean_change),
    }


def report(found: Evaluation) -> str:
    """The result for people, every number with its standard error."""
    rows = [["", "", ""], ["perplexity", *_shown(found.perplexity, 4)]]
    if found.comparison is not None:
        rows += _comparison_rows(found.comparison)
    size = f"{found.positions} tokens scored, {found.chunks} chunks of {found.context}"
    return table(rows, right=(1,)).lstrip("\n") + f"\n({size})"


def _comparison_rows(both: Comparison) -> list[list[str]]:
    rows = [
        ["perplexity of the reference", *_shown(both.base_perplexity, 4)],
        ["ln of their ratio", *_shown(both.log_ratio, 6)],
        ["mean KLD", *_shown(both.mean, 6)],
    ]
    rows += [[f"{QUANTILE_NAMES[share]} KLD", *_shown(value, 6)] for share, value in both.quantiles.items()]
    return [
        *rows,
        ["same top token, %", *_shown(both.same_top, 3, 100)],
        ["RMS change of the true token's probability, %", *_shown(both.rms_change, 3, 100)],
    ]


def _shown(estimate: Estimate, digits: int, factor: int = 1) -> list[str]:
    return [f"{factor * estimate.value:.{digits}f}", f"± {factor * estimate.error:.{digits}f}"]
