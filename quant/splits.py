"""Split models: one model in several GGUF files, named like model-00001-of-00003.gguf.

The first file holds the metadata (and tensors, as a rule); every file holds some tensors and three keys: its number
from 0, the number of files, and the number of tensors in all of them. Reading checks that the files belong together.
Writing follows the peers, byte for byte: llama-quantize --keep-split, llama-gguf-split, and convert_hf_to_gguf.py. What
fits one file is no split model and gets neither a number nor the keys. Where pruning empties a file, on which
llama-quantize dies, it goes; a first tensor above the limit, which llama-gguf-split refuses, has a file of its own.
Source: llama.cpp, src/llama-model-loader.cpp, src/llama-quant.cpp, tools/gguf-split; gguf-py, gguf_writer.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguforge.quant.constants import GGUFValueType, Keys
from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.metadata import Value, int32
from gguforge.quant.plan import DEFAULT_ALIGNMENT, Plan, TensorPlan, padded
from gguforge.quant.reader import GGUFFile, read_gguf

NUMBER, COUNT, TENSORS = (
    Keys.Split.LLM_KV_SPLIT_NO,
    Keys.Split.LLM_KV_SPLIT_COUNT,
    Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
)
SPLIT_KEYS = (NUMBER, COUNT, TENSORS)
KINDS = {NUMBER: GGUFValueType.UINT16, COUNT: GGUFValueType.UINT16, TENSORS: GGUFValueType.INT32}
MAX_FILES = 2**16 - 1


@dataclass(frozen=True)
class Limits:
    """When a file is full: the next tensor would make it larger than that; it holds at least one tensor.

    Attributes:
        nbytes: bytes of tensors, None for no limit.
        tensors: number of tensors, None for no limit.
        by_converter: divide as convert_hf_to_gguf.py does and not as llama-gguf-split, which counts the padding
            between tensors too and puts the number of files behind the number of tensors.
    """

    nbytes: int | None = None
    tensors: int | None = None
    by_converter: bool = False


def parse_size(text: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1000 and Ki, Mi, Gi or Ti for powers of 1024; a B may follow.

    Raises:
        InputError: it is none.

    Example:
        >>> parse_size("500M"), parse_size("3.5GB"), parse_size("1 GiB")
        (500000000, 3500000000, 1073741824)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(I?))?B?", text.strip().upper(), re.ASCII)
    base = 1024 if match and match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or " ")) if match else 0
    if not size:
        raise InputError(f"{text!r} is no size", expected="a number of bytes such as 2G, 3.5GB, 500M or 1000000")
    return size


def part_name(path: Path, number: int, count: int) -> Path:
    """The name of a part, its number counted from 0; an ending `.gguf` or `-00001-of-00003.gguf` of `path` goes.

    >>> str(part_name(Path("dir/model.gguf"), 0, 3))
    'dir/model-00001-of-00003.gguf'
    """
    return path.with_name(f"{whole_name(path.name)}-{number + 1:05d}-of-{count:05d}.gguf")


def whole_name(name: str) -> str:
    """A model's file name without `.gguf` and without the number of a part.

    >>> whole_name("model-00002-of-00003.gguf")
    'model'
    """
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name)


def read_model(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the layout of a model, whether it lies in one GGUF file or in several.

    Args:
        path: the file; of a split model, the first one.

    Returns:
        The file; of a split model, the first one with the tensors and the bytes of all (see `GGUFFile.splits`).

    Raises:
        GGUFError: a file is damaged, missing or of another model, or does not come first.
        OSError: a file cannot be read.
    """
    first = read_gguf(path)
    count = _number(first, COUNT)
    if count is None or count < 2:
        return first
    _check_first(first, count)
    parts = (first, *(_part(first, number, count) for number in range(1, count)))
    _check_tensors(parts)
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return replace(first, tensors=tensors, size=sum(part.size for part in parts), splits=parts)


def _number(file: GGUFFile, key: str) -> int | None:
    """A split key, None where it is missing; llama.cpp refuses, or aborts on, another type."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if value.kind != KINDS[key] or not isinstance(value.value, int):
        raise GGUFError(
            f"{key} has the wrong type", path=file.path, expected=KINDS[key].name, found=value.kind.name,
            remedy="Split the model again.",
        )  # fmt: skip
    return value.value


def _check_first(file: GGUFFile, count: int) -> None:
    number = _number(file, NUMBER)
    if number is None:
        raise GGUFError(f"is part of a split model and has no {NUMBER}", path=file.path)
    name = part_name(file.path, 0, count)
    if number:
        raise GGUFError(
            f"is part {number + 1} of {count} of a split model", path=file.path,
            remedy=f"Give the first part, as a rule {name.name}.",
        )  # fmt: skip
    if file.path.name != name.name:
        raise GGUFError(
            f"is the first of {count} parts of a split model, and is not named so", path=file.path,
            expected=name.name, found=file.path.name, remedy="Give all parts the names they had.",
        )  # fmt: skip
    for stray in file.path.parent.glob(f"*-of-{count:05d}.gguf"):
        match = re.fullmatch(r"-(\d{5})-of-\d{5}\.gguf", stray.name.removeprefix(whole_name(file.path.name)))
        if match and not 1 <= int(match[1]) <= count:
            raise GGUFError(
                "is none of the parts that the first one counts", path=stray, expected=f"1 to {count}",
                found=int(match[1]), remedy="Remove it, or put the right parts into one folder.",
            )  # fmt: skip


def _part(first: GGUFFile, number: int, count: int) -> GGUFFile:
    """Part `number` of the model, from 1 on."""
    path = part_name(first.path, number, count)
    try:
        part = read_gguf(path)
    except FileNotFoundError:
        raise GGUFError(
            f"part {number + 1} of {count} of the model is missing", path=path,
            remedy="All parts must lie in one folder, under the names they had.",
        ) from None  # fmt: skip
    found = _number(part, NUMBER)
    if found != number:
        raise GGUFError(
            f"is not part {number + 1} of the model", path=path, expected=f"{NUMBER} {number}", found=found,
            remedy="Give all parts the names they had, or download them again.",
        )  # fmt: skip
    for key in (COUNT, TENSORS, Keys.General.ARCHITECTURE):
        values = [file.metadata[key].value if key in file.metadata else None for file in (first, part)]
        if values[1] is not None and values[0] != values[1]:
            raise GGUFError(
                "is part of another model", path=path, expected=f"{key} {values[0]}", found=values[1],
                remedy=f"Put the parts that belong to {first.path.name} into its folder.",
            )  # fmt: skip
    return part


def _check_tensors(parts: Sequence[GGUFFile]) -> None:
    seen: dict[str, str] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in seen:
                raise GGUFError(
                    f"is also in {seen[tensor.name]}", path=part.path, tensor=tensor.name,
                    remedy="The parts are not of one model: download them again.",
                )  # fmt: skip
            seen[tensor.name] = part.path.name
    expected = _number(parts[0], TENSORS)
    if expected != len(seen):
        raise GGUFError(
            "the parts of the model do not hold the tensors that they should", path=parts[0].path,
            expected=f"{TENSORS} {len(seen)}", found=expected, remedy="Download all parts again.",
        )  # fmt: skip


def divide(plan: Plan, limits: Limits) -> tuple[Plan, ...]:
    """The plans of the files that a model is split into.

    Returns:
        A plan for each file; the plan itself, unchanged, where everything fits one file.

    Raises:
        InputError: more files than the format can count.
    """
    groups: list[list[TensorPlan]] = [[]]
    total = 0
    for tensor in plan.tensors:
        nbytes = tensor.nbytes if limits.by_converter else padded(tensor.nbytes, DEFAULT_ALIGNMENT)
        full = limits.tensors is not None and len(groups[-1]) >= limits.tensors
        if groups[-1] and (full or (limits.nbytes is not None and total + nbytes > limits.nbytes)):
            groups.append([])
            total = 0
        groups[-1].append(tensor)
        total += nbytes
    return _plans(plan, groups, SPLIT_KEYS if limits.by_converter else (NUMBER, TENSORS, COUNT))


def divide_like(plan: Plan, file: GGUFFile) -> tuple[Plan, ...]:
    """The plans of files that hold the same tensors as those of a split model, as llama-quantize --keep-split.

    Args:
        plan: made from `file`; its tensors stand in the file's order.
        file: the model that was read.

    Returns:
        A plan for each file. A file whose tensors were all pruned goes, except the first; where one is left, it is the
        plan itself.
    """
    groups: dict[str, list[TensorPlan]] = {str(part.path): [] for part in file.splits or (file,)}
    for tensor in plan.tensors:
        groups[tensor.source.paths[0]].append(tensor)
    first, *others = groups.values()
    return _plans(plan, [first, *filter(None, others)], SPLIT_KEYS)


def _plans(plan: Plan, groups: Sequence[Iterable[TensorPlan]], keys: Sequence[str]) -> tuple[Plan, ...]:
    if len(groups) == 1:
        return (plan,)
    if len(groups) > MAX_FILES:
        raise InputError(
            f"the model would be split into {len(groups)} files", expected=f"at most {MAX_FILES}",
            remedy="Choose a larger limit.",
        )  # fmt: skip
    plans = []
    for number, tensors in enumerate(groups):
        values = {
            NUMBER: Value(KINDS[NUMBER], number),
            COUNT: Value(KINDS[COUNT], len(groups)),
            TENSORS: int32(len(plan.tensors)),
        }
        own = {key: values[key] for key in keys}
        first = number == 0
        metadata = {**plan.metadata, **own} if first else own
        alignment = plan.alignment if first else DEFAULT_ALIGNMENT
        plans.append(Plan(metadata, tuple(tensors), alignment, plan.every_dimension))
    return tuple(plans)


def named(plans: Sequence[Plan], output: str | os.PathLike[str]) -> list[tuple[Path, Plan]]:
    """Each plan with the file it is to become: `output` if there is one, else parts named after it."""
    output = Path(output)
    if len(plans) == 1:
        return [(output, plans[0])]
    return [(part_name(output, number, len(plans)), plan) for number, plan in enumerate(plans)]
