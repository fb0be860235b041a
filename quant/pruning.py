"""Pruning: a model without some of its layers, the others renumbered, as llama-quantize --prune-layers does it.

Only names, and the number of layers, change: lists with an entry for each layer stay as they are in the metadata. Of
encoders and decoders (enc.blk.0., dec.blk.0.), where llama-quantize takes layer 10 for the one after layer 1, the order
is kept here. Source: llama.cpp, src/llama-quant.cpp (remap_layer).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from gguforge.quant.errors import InputError

LAYER = re.compile(r"blk\.([0-9]+)\.")
"""A tensor's layer, anywhere in its name: encoders and decoders have enc.blk.0. and dec.blk.0."""


def parse_layers(words: Iterable[str]) -> tuple[int, ...]:
    """Layer numbers from words such as `1,2,3`.

    Raises:
        InputError: something else is among them.

    Example:
        >>> parse_layers(["3,1", "2"])
        (1, 2, 3)
    """
    listed = [text.strip() for word in words for text in word.split(",")]
    for text in listed:
        if not re.fullmatch("[0-9]{1,6}", text):
            raise InputError(f"{text!r} is no layer", expected="numbers from 0 on, such as 1,2,3")
    return tuple(sorted(set(map(int, listed))))


def without_layers(names: Iterable[str], pruned: Collection[int]) -> tuple[dict[str, str], int]:
    """The tensors that stay when layers are pruned.

    Args:
        names: those of all tensors.
        pruned: numbers of the layers that go, at least one.

    Returns:
        The new name of each tensor by its old one, without those of the pruned layers; and how many layers are left.

    Raises:
        InputError: there is no such layer, or none would be left.
    """
    found = {name: LAYER.search(name) for name in names}
    layers = {int(match[1]) for match in found.values() if match}
    for layer in sorted(pruned):
        if layer not in layers:
            known = f"0 to {max(layers)}" if layers else "none"
            raise InputError(f"the model has no layer {layer} to prune", expected=known)
    numbers: dict[int, int] = {}
    following = 0
    for old in sorted(layers - set(pruned)):
        numbers[old] = old if old < min(pruned) else following
        following = numbers[old] + 1
    if not numbers:
        raise InputError("no layer would be left", expected=f"fewer than all {len(layers)} layers to prune")
    renamed = {
        name: name if match is None else f"{name[: match.start(1)]}{numbers[int(match[1])]}{name[match.end(1) :]}"
        for name, match in found.items()
        if match is None or int(match[1]) in numbers
    }
    return renamed, following
