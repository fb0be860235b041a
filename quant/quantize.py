"""Quantize: from a plan (of a GGUF file or of a checkpoint) to the plan of the file that llama-quantize would write.

Order of tensors, metadata and padding follow llama-quantize, so that the file is the same byte for byte. It does not
read tensor data: executing the plan is `gguforge.quant.writer.write`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gguforge.quant.constants import GGML_QUANT_VERSION, GGMLQuantizationType, Keys
from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import ImportanceMatrix
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.model import Model
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import UNQUANTIZED, Preset, find_preset
from gguforge.quant.reader import GGUFFile, read_gguf
from gguforge.quant.roles import Role, file_order, role
from gguforge.quant.rules import Overrides, TypeChooser, needs_importance
from gguforge.quant.sources import Floats
from gguforge.quant.writer import Progress, write

SPLIT_KEYS = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)


def plan_of_file(file: GGUFFile) -> Plan:
    """The plan that copies a GGUF file."""
    tensors = (TensorPlan(info.name, info.shape, info.type, file.source(info)) for info in file.tensors)
    return Plan(file.metadata, tuple(tensors), file.alignment)


@dataclass(frozen=True, eq=False)
class Guide:
    """An importance matrix, and what the output's metadata say of it.

    Attributes:
        weights: importance of each column by tensor name, shape (matrices, columns).
        path: the file's name as it was given.
        dataset: the name of the calibration text, if known.
        chunks: chunks of text that went in, 0 if unknown.
    """

    weights: Mapping[str, Floats]
    path: str
    dataset: str | None = None
    chunks: int = 0

    @classmethod
    def from_matrix(
        cls, matrix: ImportanceMatrix, path: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> Guide:
        """Use a matrix, or a part: entries whose names contain a word of `include`, or no word of `exclude`.

        Raises:
            InputError: an entry holds NaN or infinity.
        """
        names = [name for name in matrix.entries if not any(word in name for word in exclude)]
        names = [name for name in names if not include or any(word in name for word in include)]
        weights = {name: found for name in names if (found := matrix.weights(name)) is not None}
        for name, values in weights.items():
            if not np.isfinite(values).all():
                raise InputError("importance matrix holds NaN or infinity", path=path, tensor=name)
        return cls(weights, path, matrix.datasets[0] if matrix.datasets else None, matrix.chunk_count)

    def metadata(self) -> dict[str, Value]:
        """The keys that llama-quantize adds; texts are cut to 127 bytes as there."""
        found = {"quantize.imatrix.file": string(_cut(self.path))}
        if self.dataset is not None:
            found["quantize.imatrix.dataset"] = string(_cut(self.dataset))
        found["quantize.imatrix.entries_count"] = uint32(len(self.weights))
        if self.chunks > 0:
            found["quantize.imatrix.chunks_count"] = uint32(self.chunks)
        return found


def _cut(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:127].decode("utf-8", "surrogateescape")


def retype(
    plan: Plan,
    preset: Preset | str,
    *,
    allow_requantize: bool = False,
    overrides: Overrides | None = None,
    guide: Guide | None = None,
    metadata: Mapping[str, Value] | None = None,
) -> Plan:
    """The same model with the types of a preset.

    Args:
        plan: what to start from.
        preset: a preset or its name.
        allow_requantize: quantize tensors that are quantized already; they lose quality twice.
        overrides: what the user wants otherwise than the preset.
        guide: an importance matrix.
        metadata: keys to add or replace.

    Raises:
        InputError: unknown preset, no model, a tensor is quantized already, or its importance is missing or misshapen.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    guide = guide if guide is not None and guide.weights else None
    tensors = sorted(plan.tensors, key=lambda tensor: file_order(tensor.name))
    names = [tensor.name for tensor in tensors]
    model = Model.from_metadata(plan.metadata)
    chooser = TypeChooser(preset, model, names, overrides or Overrides(), importance=guide is not None)
    chosen = (_retyped(tensor, chooser, allow_requantize) for tensor in tensors)
    guided = tuple(_guided(tensor, preset, guide) for tensor in chosen)
    added = {**(metadata or {}), **(guide.metadata() if guide is not None else {})}
    return Plan(_metadata(plan, preset, added), guided, plan.alignment)


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


def _guided(tensor: TensorPlan, preset: Preset, guide: Guide | None) -> TensorPlan:
    """Attach a tensor's importance, if it is going to be encoded."""
    if tensor.is_copy:
        return tensor
    found = None if guide is None else guide.weights.get(tensor.name)
    if found is not None:
        matrices = tensor.shape[-3] if len(tensor.shape) > 2 else 1
        if found.size == matrices * tensor.row_length:
            return replace(tensor, importance=np.ascontiguousarray(found, np.float32).reshape(matrices, -1))
        if role(tensor.name) is not Role.TOKEN_EMBEDDING:
            raise InputError(
                "importance matrix is of another model",
                path=guide.path if guide is not None else None,
                tensor=tensor.name,
                expected=f"{matrices * tensor.row_length} numbers",
                found=found.size,
            )
    if needs_importance(tensor.name, tensor.type):
        raise InputError(
            f"{tensor.type.name} needs an importance matrix",
            tensor=tensor.name,
            remedy="Quantize with --imatrix (gguforge calibrate makes one), or choose another type.",
        )
    return tensor


def _metadata(plan: Plan, preset: Preset, added: Mapping[str, Value]) -> dict[str, Value]:
    """Split keys go; keys that change move to the end, as in llama-quantize."""
    changed = {
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
        Keys.General.FILE_TYPE: uint32(preset.file_type),
    }
    kept = {key: value for key, value in plan.metadata.items() if key not in SPLIT_KEYS}
    for key, value in [*changed.items(), *added.items()]:
        kept.pop(key, None)
        kept[key] = value
    return kept


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    preset: Preset | str,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    allow_requantize: bool = False,
    overrides: Overrides | None = None,
    guide: Guide | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a GGUF file; the output equals llama-quantize's byte for byte.

    Args:
        source: a GGUF file, best F32, F16 or BF16.
        output: the file to make.
        preset: a preset or its name.
        workers, overwrite, progress: see `gguforge.quant.writer.write`.
        allow_requantize, overrides, guide: see `retype`.

    Returns:
        The plan that was executed.

    Raises:
        GGUForgeError: see `read_gguf`, `retype` and `write`.
    """
    copied = plan_of_file(read_gguf(source))
    plan = retype(copied, preset, allow_requantize=allow_requantize, overrides=overrides, guide=guide)
    write(plan, output, workers=workers, overwrite=overwrite, progress=progress)
    return plan


def types_count(plan: Plan) -> dict[GGMLQuantizationType, tuple[int, int]]:
    """For each type of a plan, largest share first: number of tensors and of bytes."""
    count: dict[GGMLQuantizationType, tuple[int, int]] = {}
    for tensor in plan.tensors:
        tensors, nbytes = count.get(tensor.type, (0, 0))
        count[tensor.type] = tensors + 1, nbytes + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1][1]))
