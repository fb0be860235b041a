"""Quantize: from a plan (of a GGUF file or of a checkpoint) to the plan of the file that llama-quantize would write.

Order of tensors, metadata and padding follow llama-quantize, so that the file is the same byte for byte. It does not
read tensor data: executing the plan is `gguforge.quant.writer.write`.
"""

from __future__ import annotations

import os
from dataclasses import replace

from gguforge.quant.constants import GGML_QUANT_VERSION, GGMLQuantizationType, Keys
from gguforge.quant.errors import InputError
from gguforge.quant.metadata import Value, uint32
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import UNQUANTIZED, Model, Preset, TypeChooser, file_order, find_preset
from gguforge.quant.reader import GGUFFile, read_gguf
from gguforge.quant.writer import Progress, write

SPLIT_KEYS = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)


def plan_of_file(file: GGUFFile) -> Plan:
    """The plan that copies a GGUF file."""
    tensors = (TensorPlan(info.name, info.shape, info.type, file.source(info)) for info in file.tensors)
    return Plan(file.metadata, tuple(tensors), file.alignment)


def retype(plan: Plan, preset: Preset | str, *, allow_requantize: bool = False) -> Plan:
    """The same model with the types of a preset.

    Args:
        plan: what to start from.
        preset: a preset or its name.
        allow_requantize: quantize tensors that are quantized already; they lose quality twice.

    Raises:
        InputError: unknown preset, no model, or a tensor is quantized already.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    tensors = sorted(plan.tensors, key=lambda tensor: file_order(tensor.name))
    chooser = TypeChooser(preset, Model.from_metadata(plan.metadata), [tensor.name for tensor in tensors])
    chosen = tuple(_retyped(tensor, chooser, allow_requantize) for tensor in tensors)
    return Plan(_metadata(plan, preset), chosen, plan.alignment)


def _retyped(tensor: TensorPlan, chooser: TypeChooser, allow_requantize: bool) -> TensorPlan:
    choice = chooser.choose(tensor.name, tensor.shape, tensor.type)
    if choice.type != tensor.type and tensor.type not in UNQUANTIZED and not allow_requantize:
        raise InputError(
            f"already quantized to {tensor.type.name}",
            tensor=tensor.name,
            path=next(iter(tensor.source.paths), None),
            remedy="Start from the F16, BF16 or F32 file, or pass --allow-requantize and lose quality twice.",
        )
    return replace(tensor, type=choice.type, reason=choice.reason, fallback=choice.fallback)


def _metadata(plan: Plan, preset: Preset) -> dict[str, Value]:
    """Split keys go; the two keys that change move to the end, as in llama-quantize."""
    changed = {
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
        Keys.General.FILE_TYPE: uint32(int(preset.file_type)),
    }
    kept = {key: value for key, value in plan.metadata.items() if key not in changed and key not in SPLIT_KEYS}
    return kept | changed


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    preset: Preset | str,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a GGUF file; the output equals llama-quantize's byte for byte.

    Args:
        source: a GGUF file, best F32, F16 or BF16.
        output: the file to make.
        preset: a preset or its name.
        workers, overwrite, progress: see `gguforge.quant.writer.write`.
        allow_requantize: see `retype`.

    Returns:
        The plan that was executed.

    Raises:
        GGUForgeError: see `read_gguf`, `retype` and `write`.
    """
    plan = retype(plan_of_file(read_gguf(source)), preset, allow_requantize=allow_requantize)
    write(plan, output, workers=workers, overwrite=overwrite, progress=progress)
    return plan


def types_count(plan: Plan) -> dict[GGMLQuantizationType, tuple[int, int]]:
    """For each type of a plan, largest share first: number of tensors and of bytes."""
    count: dict[GGMLQuantizationType, tuple[int, int]] = {}
    for tensor in plan.tensors:
        tensors, nbytes = count.get(tensor.type, (0, 0))
        count[tensor.type] = tensors + 1, nbytes + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1][1]))
