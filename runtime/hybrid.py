"""A model with some tensors of another: the reference but for one part, to see what that part's types cost.

The file is executed by real kernels, so what is measured is what a user would get. It is written by the planner and
writer of `gguforge.quant`; it does not measure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import plan_of_file
from gguforge.quant.reader import GGUFFile
from gguforge.quant.roles import layer


def part(name: str) -> tuple[int | None, str]:
    """Layer and kind of a tensor; the layer is None for what stands outside the layers.

    >>> part("blk.3.ffn_down.weight")
    (3, 'ffn_down')
    >>> part("output.weight")
    (None, 'output')
    """
    found = layer(name)
    words = name.split(".")
    return (found, words[2]) if found >= 0 and len(words) > 2 else (None, words[0])


def hybrid(reference: GGUFFile, other: GGUFFile, names: Collection[str]) -> Plan:
    """The plan of the reference with the tensors of these names taken from the other.

    Raises:
        InputError: a tensor is missing in the other, or has another shape.
    """
    theirs = {tensor.name: tensor for tensor in plan_of_file(other).tensors}
    base = plan_of_file(reference)
    tensors = []
    for tensor in base.tensors:
        if tensor.name not in names:
            tensors.append(tensor)
            continue
        found = theirs.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            raise InputError(
                "is no quantized form of the reference", path=other.path, tensor=tensor.name,
                expected=f"shape {tensor.shape}", found="none" if found is None else f"shape {found.shape}",
            )  # fmt: skip
        tensors.append(replace(found, reason="taken from the other model"))
    return Plan(base.metadata, tuple(tensors), base.alignment)


def differing_parts(reference: GGUFFile, other: GGUFFile) -> dict[tuple[int | None, str], list[str]]:
    """Names of the tensors that have another type in the other model, by part, in file order."""
    types = {info.name: info.type for info in reference.tensors}
    parts: dict[tuple[int | None, str], list[str]] = {}
    for info in other.tensors:
        if info.name in types and types[info.name] != info.type:
            parts.setdefault(part(info.name), []).append(info.name)
    return parts
