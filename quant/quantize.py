"""Quantize: from a plan (of a GGUF file or of a checkpoint) to the plan of the file that llama-quantize would write.

Order of tensors, metadata and padding follow llama-quantize, so that the file is the same byte for byte. It does not
read tensor data: executing the plan is `gguforge.quant.writer.write`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gguforge.quant.constants import GGML_QUANT_VERSION, GGMLQuantizationType, Keys, LlamaFileType
from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import ImportanceMatrix
from gguforge.quant.metadata import Value, string, uint32
from gguforge.quant.model import Model
from gguforge.quant.plan import Plan, TensorPlan
from gguforge.quant.presets import ALIASES, PRESETS, UNQUANTIZED, Preset, find_preset
from gguforge.quant.pruning import without_layers
from gguforge.quant.reader import GGUFFile
from gguforge.quant.roles import Role, file_order, role
from gguforge.quant.rules import Overrides, TypeChooser, needs_importance
from gguforge.quant.sources import Floats
from gguforge.quant.splits import SPLIT_KEYS, Limits, divide, divide_like, named, read_model
from gguforge.quant.writer import Progress, write_all

GUESSED = LlamaFileType.GUESSED

COPY = Preset("COPY", 0, GGMLQuantizationType.F32)
"""Every tensor keeps its type: llama-quantize's word for ordering, pruning, splitting or merging a model as it is."""


def preset_or_copy(name: str) -> Preset:
    """`find_preset`, which also knows COPY."""
    return COPY if name.strip().upper() == COPY.name else find_preset(name)


def plan_of_file(file: GGUFFile) -> Plan:
    """The plan that copies a GGUF file; of a split model, into one file."""
    tensors = (TensorPlan(info.name, info.shape, info.type, file.source(info)) for info in file.tensors)
    metadata = file.metadata
    if file.splits:
        metadata = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    return Plan(metadata, tuple(tensors), file.alignment)


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
    prune: Collection[int] = (),
    keep_order: bool = False,
) -> Plan:
    """The same model with the types of a preset.

    Args:
        plan: what to start from.
        preset: a preset or its name; COPY keeps all types.
        allow_requantize: quantize tensors that are quantized already; they lose quality twice.
        overrides: what the user wants otherwise than the preset.
        guide: an importance matrix; its entries are named as the tensors were before pruning.
        metadata: keys to add or replace.
        prune: layers to leave out.
        keep_order: leave the tensors in the plan's order, as a split that is to be kept needs.

    Raises:
        InputError: unknown preset, no model, a tensor is quantized already, its importance is missing or misshapen, or
            a layer to prune is not there.
    """
    preset = preset_or_copy(preset) if isinstance(preset, str) else preset
    guide = guide if guide is not None and guide.weights else None
    added = {**(metadata or {}), **(guide.metadata() if guide is not None else {})}
    known = {**plan.metadata, **added}  # llama-quantize applies its rules to what the metadata become
    kept = _kept(plan, prune, keep_order)
    if prune:
        layers = without_layers((tensor.name for tensor in plan.tensors), prune)[1]
        key = f"{Model.from_metadata(known).architecture}.block_count"
        added = {name: value for name, value in added.items() if name != key} | {key: uint32(layers)}
    if preset is COPY:
        tensors = [replace(tensor, reason="copied") for _, tensor in kept]
        return Plan(_metadata(plan, stored_file_type(plan, known), added), tuple(tensors), plan.alignment)
    names = [tensor.name for _, tensor in kept]
    model = Model.from_metadata(known)
    chooser = TypeChooser(preset, model, names, overrides or Overrides(), importance=guide is not None)
    tensors = [_guided(old, _retyped(tensor, chooser, allow_requantize), guide) for old, tensor in kept]
    return Plan(_metadata(plan, preset.file_type, added), tuple(tensors), plan.alignment)


def _kept(plan: Plan, prune: Collection[int], keep_order: bool) -> list[tuple[str, TensorPlan]]:
    """The tensors of the output in its order, each renamed and with its old name."""
    tensors = plan.tensors if keep_order else sorted(plan.tensors, key=lambda tensor: file_order(tensor.name))
    if not prune:
        return [(tensor.name, tensor) for tensor in tensors]
    names = without_layers((tensor.name for tensor in tensors), prune)[0]
    return [(tensor.name, replace(tensor, name=names[tensor.name])) for tensor in tensors if tensor.name in names]


def stored_file_type(plan: Plan, metadata: Mapping[str, Value]) -> int:
    """The file type that a model has, as llama.cpp reads it.

    Where the metadata do not tell, it is the one named after the type that most tensors have, marked as a guess.
    """
    told = metadata.get(Keys.General.FILE_TYPE)
    if told is not None and isinstance(told.value, int):
        return told.value
    count: Counter[str] = Counter()
    name = "F32"
    for tensor in sorted(plan.tensors, key=lambda tensor: file_order(tensor.name)):
        count[tensor.type.name] += 1
        if count[tensor.type.name] > count[name]:  # of two types as frequent, the one that was so first
            name = tensor.type.name
    preset = PRESETS.get(ALIASES.get(name, name))
    number = LlamaFileType.MOSTLY_NVFP4 if name == "NVFP4" else preset.file_type if preset is not None else 0
    return GUESSED | number


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


def _guided(name: str, tensor: TensorPlan, guide: Guide | None) -> TensorPlan:
    """Attach a tensor's importance, which the guide knows by another name if layers are pruned, if it is encoded."""
    if tensor.is_copy:
        return tensor
    found = None if guide is None else guide.weights.get(name)
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


def _metadata(plan: Plan, file_type: int, added: Mapping[str, Value]) -> dict[str, Value]:
    """Split keys go; keys that change move to the end, as in llama-quantize."""
    changed = {
        Keys.General.QUANTIZATION_VERSION: uint32(GGML_QUANT_VERSION),
        Keys.General.FILE_TYPE: uint32(file_type),
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
    prune: Collection[int] = (),
    keep_split: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a model; the output equals llama-quantize's byte for byte.

    Args:
        source: a GGUF file, best F32, F16 or BF16; of a split model, the first one.
        output: the file to make; where there are several, they are named after it.
        preset: a preset or its name, or COPY.
        workers, overwrite, progress: see `gguforge.quant.writer.write`.
        allow_requantize, overrides, guide, prune: see `retype`.
        keep_split: write the files that the source is split into.
        limits: split the output; with `keep_split` there are none.

    Returns:
        The plan that was executed.

    Raises:
        GGUForgeError: see `read_model`, `retype` and `write_all`.
    """
    file = read_model(source)
    plan = retype(
        plan_of_file(file), preset, allow_requantize=allow_requantize, overrides=overrides, guide=guide, prune=prune,
        keep_order=keep_split,
    )  # fmt: skip
    plans = divide_like(plan, file) if keep_split else divide(plan, limits or Limits())
    write_all(named(plans, output), workers=workers, overwrite=overwrite, progress=progress)
    return plan


def types_count(plan: Plan) -> dict[GGMLQuantizationType, tuple[int, int]]:
    """For each type of a plan, largest share first: number of tensors and of bytes."""
    count: dict[GGMLQuantizationType, tuple[int, int]] = {}
    for tensor in plan.tensors:
        tensors, nbytes = count.get(tensor.type, (0, 0))
        count[tensor.type] = tensors + 1, nbytes + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1][1]))
