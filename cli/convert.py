"""`gguforge convert`: a Hugging Face checkpoint into a GGUF file of any type, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gguforge.cli.common import gathered
from gguforge.cli.importance import IMPORTANCE_OPTIONS, Importance, read_guide
from gguforge.cli.rules import rules_option
from gguforge.cli.tuning import LEVELS, hint_at_grids, on_grids
from gguforge.cli.writing import Writing, writing_options

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
@click.option(
    "--quality",
    type=click.Choice(LEVELS[:2]),
    default=LEVELS[0],
    show_default=True,
    help="lossless: weights that lie on a quantization grid already, after training on one, stay there.",
)
@rules_option
@gathered(Importance, "importance", *IMPORTANCE_OPTIONS)
@writing_options
def command(
    checkpoint: str,
    type_name: str,
    model_name: str | None,
    pre: str | None,
    quality: str,
    rules: str,
    importance: Importance,
    writing: Writing,
) -> None:
    """Convert the Hugging Face checkpoint in the folder CHECKPOINT.

    Reads config.json, *.safetensors and the tokenizer; torch and transformers are not needed. Quantized types are made
    straight from the stored weights. Without -o, the file gets the model's name and type, in the current folder.

    \b
    Examples:
      gguforge convert path/to/checkpoint --type Q4_K_M -o model.gguf
      gguforge convert path/to/checkpoint --type BF16
      gguforge convert path/to/checkpoint --type IQ2_M --imatrix imatrix.gguf
      gguforge convert path/to/checkpoint --type Q6_K --dry-run
      gguforge convert path/to/trained --type Q4_0 --quality lossless
    """
    from gguforge.convert import default_file_name, plan
    from gguforge.quant.rule_files import find_rules

    remarks: list[str] = []
    guide = read_guide(importance.imatrix, importance.include, importance.exclude)
    made = plan(
        checkpoint,
        type_name,
        pre=pre,
        model_name=model_name,
        rules=find_rules(rules),
        guide=guide,
        warn=remarks.append,
    )
    for remark in remarks:
        click.echo(f"warning: {remark}", err=True)
    label = file_type_name(made)
    if quality == LEVELS[0]:
        hint_at_grids(made, writing)
    else:
        made = on_grids(made, quality, writing)
    plans = writing.divide(writing.stamped(made), by_converter=True)
    writing.execute(plans, default_file_name(made, label), label, {"warnings": remarks})


def file_type_name(plan: Plan) -> str:
    """The name of a plan's `general.file_type`, as `--type` takes it: Q4_K_M, BF16."""
    from gguforge.quant.constants import LlamaFileType

    number = plan.metadata["general.file_type"].value
    assert isinstance(number, int)
    name: str = LlamaFileType(number).name
    return name.removeprefix("ALL_").removeprefix("MOSTLY_")
