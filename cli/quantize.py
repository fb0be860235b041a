"""`gguforge quantize`: a GGUF file into a smaller one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gguforge.cli.common import gathered, warn
from gguforge.cli.importance import IMPORTANCE_OPTIONS, read_guide
from gguforge.cli.rules import DEFAULT_RULES, print_rules_option, rules_option
from gguforge.cli.sizing import Sizing, print_forecast, sized_plan, sizing_options
from gguforge.cli.tuning import Tuning, tuning_options
from gguforge.cli.writing import Writing, writing_options

if TYPE_CHECKING:
    from gguforge.quant.plan import Plan
    from gguforge.quant.presets import Preset
    from gguforge.quant.reader import GGUFFile


TYPES = "A type is a preset of llama.cpp by name or number, in any case (Q4_K_M, q6_k, 15), or COPY."


@dataclass(frozen=True)
class Wishes:
    """What the user wants of the quantized model; a field for each option, described by its help text."""

    preset: str | None
    imatrix: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    patterns: tuple[str, ...]
    pattern_file: str | None
    output_type: str | None
    embedding_type: str | None
    keep_output: bool
    pure: bool
    rules: str
    pairs: tuple[str, ...]
    layers: tuple[str, ...]
    keep_split: bool
    explain: bool
    allow_requantize: bool

    @property
    def chooses(self) -> bool:
        """Whether an option chooses types, layers or metadata beside the preset."""
        flags = self.keep_output or self.pure or self.keep_split or self.allow_requantize or self.rules != DEFAULT_RULES
        words = self.patterns or self.pattern_file or self.output_type or self.embedding_type
        return bool(flags or words or self.pairs or self.layers)


@click.command("quantize", epilog=TYPES)
@click.argument("model", type=click.Path())
@gathered(
    Wishes,
    "wishes",
    click.option("-t", "--type", "preset", help="The preset, e.g. Q4_K_M."),
    *IMPORTANCE_OPTIONS,
    click.option("--tensor-type", "patterns", multiple=True, metavar="REGEX=TYPE", help="The type of some tensors."),
    click.option("--tensor-type-file", "pattern_file", type=click.Path(), help="A file of such REGEX=TYPE words."),
    click.option("--output-tensor-type", "output_type", metavar="TYPE", help="The type of output.weight."),
    click.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="The type of the token embedding."),
    click.option("--leave-output-tensor", "keep_output", is_flag=True, help="Leave output.weight as it is."),
    click.option("--pure", is_flag=True, help="One type for all tensors, no mix."),
    rules_option,
    click.option(
        "--override-kv", "pairs", multiple=True, metavar="KEY=TYPE:VALUE", help="Set metadata (int, float, bool, str)."
    ),
    click.option(
        "--prune-layers", "layers", multiple=True, metavar="N,N,...", help="Leave out these layers, from 0 on."
    ),
    click.option(
        "--keep-split", is_flag=True, help="Write as many files as MODEL is split into, with the same tensors."
    ),
    click.option("--explain", is_flag=True, help="Print for each tensor the rule that chose its type."),
    click.option("--allow-requantize", is_flag=True, help="Accept a model that is quantized already: it loses twice."),
)
@sizing_options
@tuning_options
@print_rules_option
@writing_options
def command(model: str, wishes: Wishes, sizing: Sizing, tuning: Tuning, writing: Writing) -> None:
    """Quantize the GGUF file MODEL, byte for byte as llama-quantize does.

    Of a split model, give the first file. COPY as a type copies a model as it is: to merge, split or prune it.

    \b
    Examples:
      gguforge quantize model-f16.gguf --type Q4_K_M -o model-q4_k_m.gguf
      gguforge quantize model-bf16.gguf --type IQ2_XS --imatrix imatrix.gguf
      gguforge quantize model-f16.gguf --type Q4_K_S --tensor-type 'ffn_down=Q6_K'
      gguforge quantize model-f16.gguf --type Q2_K --dry-run --explain
      gguforge quantize model-f16.gguf --type Q4_K_M --quality best -f calibration.txt
      gguforge quantize model-f16.gguf --target-size 3.5GB --measure-on text.txt -o model-3.5GB.gguf
      gguforge quantize model-f16.gguf --fit 8GB --ctx 8192 --measure-on text.txt
      gguforge quantize mixture-f16.gguf --type Q4_K_M --rules modern
      gguforge quantize model-f16-00001-of-00003.gguf --type Q4_K_M --keep-split
      gguforge quantize model-00001-of-00003.gguf --type COPY -o model.gguf
    """
    check(wishes, sizing, tuning, writing)
    if sizing.asked:
        quantize_to_size(model, wishes, sizing, tuning, writing)
    else:
        quantize_to_preset(model, wishes, tuning, writing)


def check(wishes: Wishes, sizing: Sizing, tuning: Tuning, writing: Writing) -> None:
    """Whether the options belong together.

    Raises:
        UsageError: they do not.
    """
    if wishes.keep_split and writing.splits:
        raise click.UsageError("--keep-split and a limit such as --split-max-size cannot be used together.")
    tuning.check()
    sizing.check(wishes.preset)
    if sizing.asked and wishes.chooses:
        raise click.UsageError("Where the size decides, no other option may choose types or leave out layers.")


def quantize_to_preset(model: str, wishes: Wishes, tuning: Tuning, writing: Writing) -> None:
    """Types by the rules of a preset."""
    from gguforge.quant.quantize import preset_or_copy
    from gguforge.quant.splits import divide_like

    assert wishes.preset is not None
    preset = preset_or_copy(wishes.preset)
    name = default_output(model, preset.name)
    file, plan = make_plan(model, preset, wishes)
    with tuning.improved(plan, model, writing.output or name, writing) as better:
        better = writing.stamped(better)
        plans = divide_like(better, file) if wishes.keep_split else writing.divide(better)
        written = writing.execute(plans, name, preset.name, {}, wishes.explain)
    tuning.prove(model, written, writing)
    if preset.name == "Q2_K_S" and wishes.imatrix is None and not writing.quiet:
        click.echo("Q2_K_S without an importance matrix loses much quality; llama-quantize refuses it.", err=True)


def quantize_to_size(model: str, wishes: Wishes, sizing: Sizing, tuning: Tuning, writing: Writing) -> None:
    """Types by measured damage."""
    from gguforge.quant.receipt import receipt_path
    from gguforge.runtime.measured import note

    name = default_output(model, sizing.label)
    output = writing.output or name
    guide = read_guide(wishes.imatrix, wishes.include, wishes.exclude)
    if writing.dry_run:
        print_forecast(model, sizing, guide, writing)
        return
    best = sized_plan(model, output, sizing, guide, writing)
    with tuning.improved(best.plan, model, output, writing) as better:
        measured = best.measured if better is best.plan else None  # tuning changes what was measured
        plans = writing.divide(writing.stamped(better, measured))
        written = writing.execute(plans, name, sizing.label, {}, wishes.explain)
    if measured is not None and written is not None and receipt_path(written).exists():
        note(measured, written)
    tuning.prove(model, written, writing)


def make_plan(model: str, preset: Preset, wishes: Wishes) -> tuple[GGUFFile, Plan]:
    """The unquantized model, and the plan of the quantized one."""
    from gguforge.quant.overrides import parse_overrides, parse_pairs
    from gguforge.quant.pruning import parse_layers
    from gguforge.quant.quantize import plan_of_file, retype
    from gguforge.quant.rule_files import find_rules
    from gguforge.quant.splits import read_model

    overrides = parse_overrides(
        wishes.patterns,
        wishes.pattern_file,
        output=wishes.output_type,
        embedding=wishes.embedding_type,
        keep_output=wishes.keep_output,
        pure=wishes.pure,
        table=find_rules(wishes.rules),
    )
    file = read_model(model)
    for pattern, _ in overrides.patterns:
        if not any(pattern.search(tensor.name) for tensor in file.tensors):
            warn(f"no tensor has a name that fits {pattern.pattern!r} of --tensor-type")
    plan = retype(
        plan_of_file(file),
        preset,
        allow_requantize=wishes.allow_requantize,
        overrides=overrides,
        guide=read_guide(wishes.imatrix, wishes.include, wishes.exclude),
        metadata=parse_pairs(wishes.pairs),
        prune=parse_layers(wishes.layers),
        keep_order=wishes.keep_split,
    )
    return file, plan


def default_output(model: str, preset: str) -> str:
    """A name beside the input: its own, with the type in place of the old one and without the number of a part.

    >>> default_output("dir/tiny-F16.gguf", "Q4_K_M")
    'dir/tiny-Q4_K_M.gguf'
    """
    from gguforge.quant.splits import whole_name

    path = Path(model)
    name = whole_name(f"{path.stem}.gguf")
    stem, _, last = name.rpartition("-")
    known = last.upper() in ("F16", "BF16", "F32")
    return str(path.with_name(f"{stem if known and stem else name}-{preset}.gguf"))
