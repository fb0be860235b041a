"""A model with some tensors of another: the reference but for one part, to see what that part's types cost.

The file is executed by real kernels, so what is measured is what a user would get. It is written by the planner and
writer of `gguforge.quant`; it does not measure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from gguforge.quant.errors import InputError
from gguforge.quant.plan import Plan
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


def hybrid(base: Plan, other: Plan, names: Collection[str]) -> Plan:
    """The base with the tensors of these names taken from the other.

    Raises:
        InputError: a tensor is missing in the other, or has another shape.
    """
    theirs = {tensor.name: tensor for tensor in other.tensors}
    tensors = []
    for tensor in base.tensors:
        if tensor.name not in names:
            tensors.append(tensor)
            continue
        found = theirs.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            raise InputError(
                "is no quantized form of the reference", tensor=tensor.name, expected=f"shape {tensor.shape}",
                found="none" if found is None else f"shape {found.shape}",
                path=next((path for one in other.tensors for path in one.source.paths), None),
            )  # fmt: skip
        tensors.append(replace(found, reason="taken from the other model"))
    return Plan(base.metadata, tuple(tensors), base.alignment)


def differing_parts(base: Plan, other: Plan) -> dict[tuple[int | None, str], list[str]]:
    """Names of the tensors that have another type in the other model, by part, in file order."""
    types = {tensor.name: tensor.type for tensor in base.tensors}
    parts: dict[tuple[int | None, str], list[str]] = {}
    for tensor in other.tensors:
        if tensor.name in types and types[tensor.name] != tensor.type:
            parts.setdefault(part(tensor.name), []).append(tensor.name)
    return parts
