"""From a checkpoint folder to a plan, and from the plan to a file.

`plan` reads headers and small files alone: config.json, the shards' headers, the tokenizer. `convert` executes it.
How the output relates to that of llama.cpp's converter is written in docs/convert.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from gguforge.convert.architectures import find_architecture
from gguforge.convert.architectures.base import UNDERSTOOD, Architecture, Row, Sizes, check, hyperparameters
from gguforge.convert.checkpoint import Checkpoint, inside, read_checkpoint
from gguforge.convert.config import Config, unreported
from gguforge.convert.json_file import Json, read_object
from gguforge.convert.metadata import general_metadata
from gguforge.convert.names import file_name
from gguforge.convert.operations import CAST_DTYPES, CastToFloat, PermuteHeads, SkipRows, Transpose
from gguforge.convert.safetensors import StoredTensor
from gguforge.convert.vocabularies import tokenizer_metadata
from gguforge.quant.constants import GGML_QUANT_VERSION, GGMLQuantizationType
from gguforge.quant.errors import CheckpointError, InputError
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import find_preset
from gguforge.quant.quantize import Guide, retype
from gguforge.quant.roles import KEPT_NAMES
from gguforge.quant.rule_tables import RuleTable
from gguforge.quant.rules import Overrides
from gguforge.quant.sources import FileSource, Source
from gguforge.quant.splits import Limits, divide, named
from gguforge.quant.writer import write_all

Warn = Callable[[str], None]
log = logging.getLogger("gguforge.convert")

FLOAT_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
"""The unquantized output types with their `general.file_type`."""

UNUSED_ENDINGS = {
    ".rotary_emb.inv_freq": "llama.cpp computes the rotary frequencies",
    ".attention.masked_bias": "a constant of old PyTorch code",
    ".attention.bias": "the causal mask, not a weight",
    ".attn.masked_bias": "a constant of old PyTorch code",
    ".attn.bias": "the causal mask, not a weight",
}
"""Endings of stored tensors that are left out on purpose, with the reason."""


def plan(
    checkpoint: str | os.PathLike[str],
    type: str = "AUTO",
    *,
    pre: str | None = None,
    model_name: str | None = None,
    rules: RuleTable | None = None,
    guide: Guide | None = None,
    warn: Warn = log.warning,
) -> Plan:
    """Plan the GGUF file of a checkpoint from headers alone.

    Args:
        checkpoint: folder with config.json, *.safetensors and a tokenizer.
        type: F32, F16, BF16, AUTO (the 16-bit type of the stored weights, F16 for others), or a preset such as Q4_K_M;
            case does not matter. Quantized weights come straight from the stored ones, with no 16-bit step between.
        pre: name of the pre-tokenizer, where tokenizer.json does not tell.
        model_name: the model's name, instead of the one the checkpoint gives.
        rules: a table that goes before llama.cpp's rules for the preset.
        guide: an importance matrix, for a preset.
        warn: receives one line for everything that may make the model answer differently from the original.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or not understood.
        InputError: no such type, or the importance matrix does not fit.
    """
    wanted = type.strip().upper()
    preset = None if wanted == "AUTO" else find_preset(wanted)
    as_is = preset is None or preset.name in FLOAT_TYPES
    if guide is not None and as_is:
        what = f"an importance matrix guides no conversion to {wanted}"
        raise InputError(what, path=guide.path, remedy="Choose a quantized type, such as --type Q4_K_M.")
    folder = read_checkpoint(Path(checkpoint))
    config_path = folder.folder / "config.json"
    architecture = find_architecture(folder.config, config_path)
    config = Config(folder.config, config_path, architecture.defaults, architecture.aliases)
    check(architecture, config)
    understood = UNDERSTOOD | architecture.understood | set(architecture.aliases.values())
    for line in unreported(config, understood, architecture.rope_types, architecture.expected):
        warn(line)
    float_type = GGMLQuantizationType[preset.name if preset is not None and as_is else _stored_type(folder)]
    tensors = _tensors(architecture, config, folder, float_type, warn)
    metadata = _metadata(architecture, config, folder, tensors, float_type, pre, model_name, warn)
    made = Plan(metadata, tensors, every_dimension=True)
    if preset is None or as_is:
        return made
    return retype(made, preset, overrides=Overrides(table=rules), guide=guide)


def plan_weights(config: Json, type: str) -> Plan:
    """Plan the weights of a model that does not exist yet, from its config.json alone; without a tokenizer.

    The tensors' sources lead nowhere: others must take their places before the plan is executed.

    Args:
        config: the content of a config.json.
        type: as in `plan`.

    Raises:
        CheckpointError: the config is not understood.
        InputError: no such type.
    """
    path = Path("config.json")
    architecture = find_architecture(config, path)
    read = Config(config, path, architecture.defaults, architecture.aliases)
    check(architecture, read)
    sizes = architecture.sizes(read)
    stored = {}
    for name, (_, row) in _expected(architecture, read, (), sizes["layers"], log.warning).items():
        shape = tuple(sizes[size] for size in row.shape.split())
        stored[name] = StoredTensor(architecture.prefix + name, "BF16", shape, str(path), 0, 2 * prod(shape))
    folder = Checkpoint(path.parent, config, stored)
    tensors = _tensors(architecture, read, folder, GGMLQuantizationType.BF16, log.warning)
    metadata = {"general.architecture": string(architecture.name)}
    metadata |= hyperparameters(architecture, read, folder, FLOAT_TYPES["BF16"])
    return retype(Plan(metadata, tensors), find_preset(type).name)


def plan_vocabulary(checkpoint: str | os.PathLike[str], *, warn: Warn = log.warning) -> Plan:
    """Plan a GGUF file without tensors: what config.json and the tokenizer's files say.

    Args:
        checkpoint: folder with config.json and a tokenizer; weights are not looked for.

    Raises:
        CheckpointError: they are missing, damaged or not understood.
    """
    path = Path(checkpoint).absolute()
    config_path = path / "config.json"
    if not config_path.is_file():
        raise CheckpointError("config.json is missing", path=path, remedy="A tokenizer's folder needs one as well.")
    folder = Checkpoint(path, read_object(inside(path, config_path.name)), {})
    architecture = find_architecture(folder.config, config_path)
    config = Config(folder.config, config_path, architecture.defaults, architecture.aliases)
    return Plan(_metadata(architecture, config, folder, (), GGMLQuantizationType.F16, None, None, warn), ())


def convert(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    type: str = "AUTO",
    pre: str | None = None,
    model_name: str | None = None,
    rules: RuleTable | None = None,
    guide: Guide | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    warn: Warn = log.warning,
) -> Plan:
    """Convert a checkpoint to a GGUF file in one pass and return the plan that was executed.

    Args:
        output: the file to write; it appears only when it is whole.
        limits: split the output into files named after it (see `gguforge.quant.splits`); None for one file.
        workers: processes; None for the writer's choice.
        overwrite: replace an existing output.
        progress: receives the bytes written since its last call.
        checkpoint, type, pre, model_name, rules, guide, warn: as in `plan`.

    Raises:
        CheckpointError, InputError: as in `plan`.
        DataError: a weight is NaN or infinite.
        OutputError: the output exists, or cannot be written.
    """
    made = plan(checkpoint, type, pre=pre, model_name=model_name, rules=rules, guide=guide, warn=warn)
    plans = divide(made, replace(limits or Limits(), by_converter=True))
    write_all(named(plans, output), workers=workers, overwrite=overwrite, progress=progress)
    return made


def default_file_name(plan: Plan, type_name: str) -> str:
    """The output's name by the GGUF naming convention, for example Prose-8M-Q4_K_M.gguf."""
    keys = ("name", "basename", "size_label", "finetune", "version")
    texts = {key: str(plan.metadata[f"general.{key}"].value) for key in keys if f"general.{key}" in plan.metadata}
    return file_name(texts, type_name)


def _stored_type(checkpoint: Checkpoint) -> str:
    """The first 16-bit type among the stored matrices; configs are known to state another."""
    matrices = (tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) >= 2)
    return next((dtype for dtype in matrices if dtype in ("BF16", "F16")), "F16")


def _metadata(
    architecture: Architecture,
    config: Config,
    checkpoint: Checkpoint,
    tensors: tuple[TensorPlan, ...],
    float_type: GGMLQuantizationType,
    pre: str | None,
    model_name: str | None,
    warn: Warn,
) -> dict[str, Value]:
    """All metadata in the order of llama.cpp's converter."""
    vocab_size = config.count("vocab_size")
    parameters = sum(tensor.elements for tensor in tensors)
    pairs = {"general.architecture": string(architecture.name)}
    pairs |= general_metadata(checkpoint, parameters, model_name, warn)
    pairs |= hyperparameters(architecture, config, checkpoint, FLOAT_TYPES[float_type.name])
    pairs["general.quantization_version"] = uint32(GGML_QUANT_VERSION)
    pairs |= architecture.before_tokenizer(config, checkpoint)
    pairs |= tokenizer_metadata(checkpoint, vocab_size, architecture.vocabularies, pre, warn)
    return pairs | architecture.after_tokenizer(config, checkpoint)


def _tensors(
    architecture: Architecture, config: Config, checkpoint: Checkpoint, float_type: GGMLQuantizationType, warn: Warn
) -> tuple[TensorPlan, ...]:
    """Generated tensors, then the stored ones in the checkpoint's order; every one accounted for."""
    sizes = architecture.sizes(config)
    stored = list(_used(architecture, checkpoint))
    expected = _expected(architecture, config, {name for name, _ in stored}, sizes["layers"], warn)
    tensors = [TensorPlan(name, source.shape, source.type, source, "generated from config.json")
               for name, source in architecture.generated(config).items()]  # fmt: skip
    for name, tensor in stored:
        if name not in expected:
            sides = {
                "found": f"shape {list(tensor.shape)}",
                "remedy": "The checkpoint is no plain " + architecture.classes[0] + ".",
            }
            raise CheckpointError(
                f"tensor has no place in {architecture.name}", path=tensor.path, tensor=tensor.name, **sides
            )
        output, row = expected.pop(name)
        tensors.append(_planned(output, _source(tensor, row, sizes), float_type))
    for name in expected:
        remedy = "Download the checkpoint again, or correct config.json."
        raise CheckpointError("tensor is missing", path=checkpoint.folder, tensor=name, remedy=remedy)
    return tuple(tensors)


def _used(architecture: Architecture, checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The stored tensors by the names that the table has for them, without those that no graph has a use for."""
    for tensor in checkpoint.tensors.values():
        name = tensor.name.removeprefix(architecture.prefix)
        for old, new in architecture.endings.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        reasons = [reason for ending, reason in UNUSED_ENDINGS.items() if name.endswith(ending)]
        reasons += [reason for beginning, reason in architecture.unused.items() if name.startswith(beginning)]
        if reasons:
            log.info("%s is left out: %s", tensor.name, reasons[0])
        else:
            yield name, tensor


def _expected(
    architecture: Architecture, config: Config, stored: Collection[str], count: int, warn: Warn
) -> dict[str, tuple[str, Row]]:
    """GGUF name and row by the table's name, for every tensor that a checkpoint with these tensors must have."""
    expected: dict[str, tuple[str, Row]] = {}
    for row in architecture.tensors:
        wanted = not row.when or (
            not config.flag("tie_word_embeddings") if row.when == "untied" else config.flag(row.when)
        )
        layers = range(count) if "{i}" in row.source else range(1)
        names = [(row.source.format(i=i), row.name.format(i=i)) for i in layers]
        if not wanted and any(source in stored for source, _ in names):
            if row.when == "untied":
                warn(f"config.json ties the embeddings, yet {row.source} is stored: it is used as the output matrix")
            else:
                warn(f"config.json does not set {row.when}, yet {row.source} is stored: it is used")
            wanted = True
        if wanted:
            expected |= {source: (name, row) for source, name in names}
    return expected


def _source(stored: StoredTensor, row: Row, sizes: Sizes) -> Source:
    """Where a tensor of the table comes from.

    Raises:
        CheckpointError: its shape does not fit config.json, or its type cannot be converted.
    """
    shape = tuple(sizes[size] for size in row.shape.split())
    if stored.shape != shape:
        sides = {"expected": f"{list(shape)} from config.json", "found": str(list(stored.shape))}
        raise CheckpointError("shape does not fit config.json", path=stored.path, tensor=stored.name, **sides)
    base = _stored_source(stored)
    if row.heads:
        return PermuteHeads(base, sizes[row.heads])
    if row.skip and sizes[row.skip]:
        return SkipRows(base, sizes[row.skip])
    return Transpose(base) if row.transposed else base


def _stored_source(stored: StoredTensor) -> FileSource | CastToFloat:
    if stored.dtype in ("F32", "F16", "BF16"):
        return FileSource(stored.path, stored.offset, stored.shape, GGMLQuantizationType[stored.dtype])
    if stored.dtype in CAST_DTYPES:
        return CastToFloat(stored.path, stored.offset, stored.shape, CAST_DTYPES[stored.dtype])
    remedy = "Convert the original checkpoint instead."
    raise CheckpointError(
        "weights of this type cannot be converted",
        path=stored.path,
        tensor=stored.name,
        found=stored.dtype,
        remedy=remedy,
    )


def _planned(name: str, source: Source, float_type: GGMLQuantizationType) -> TensorPlan:
    """A tensor with its type: vectors, norms and tables of positions stay F32, which llama.cpp's graphs ask for."""
    if len(source.shape) == 1 or name.endswith("_norm.weight"):
        return TensorPlan(name, source.shape, GGMLQuantizationType.F32, source, "vectors stay F32")
    if name in KEPT_NAMES:
        return TensorPlan(name, source.shape, GGMLQuantizationType.F32, source, "positions and token types stay F32")
    return TensorPlan(name, source.shape, float_type, source, "the type that was asked for")
