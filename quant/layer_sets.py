"""Words for sets of layers: "first 1/8", "every 3 from 1/8", "0-4", "nextn"."""

from __future__ import annotations

import re
from collections.abc import Callable

from gguforge.quant.model import Model

Selector = Callable[[int, Model], bool]

AMOUNT = r"(\d+)(?:/([1-9]\d*))?"


def parse_layer_set(text: str) -> Selector:
    """Whether a layer is in the set that a text names, for a model.

    `first`, `last` and `every` count the layers of the model proper: those for multi-token prediction, at the end,
    are `nextn`. A fraction is rounded down to whole layers, for `last` in favour of more of them, as in llama.cpp.

    Raises:
        ValueError: it names none; holds the text.

    Example:
        >>> more = [parse_layer_set(word) for word in ("first 1/8", "last 1/8", "every 3 from 1/8")]
        >>> [i for i in range(16) if any(holds(i, Model("llama", 16, 4, 0)) for holds in more)]
        [0, 1, 4, 7, 10, 13, 14, 15]
    """
    words = " ".join(text.split())
    if words == "nextn":
        return lambda i, model: i >= model.layers - model.nextn
    if found := re.fullmatch(rf"first {AMOUNT}", words):
        first = _amount(found[1], found[2])
        return lambda i, model: i < first(_proper(model))
    if found := re.fullmatch(rf"last {AMOUNT}", words):
        total, part = int(found[1]), int(found[2] or 0)
        return lambda i, model: _from_last(_proper(model), total, part) <= i < _proper(model)
    if found := re.fullmatch(rf"every ([1-9]\d*)(?: from {AMOUNT})?", words):
        step, start = int(found[1]), _amount(found[2] or "0", found[3])
        return lambda i, model: (
            start(_proper(model)) <= i < _proper(model) and (i - start(_proper(model))) % step == step - 1
        )
    if found := re.fullmatch(r"(\d+)(?: ?- ?(\d+))?", words):
        low, high = int(found[1]), int(found[2] or found[1])
        if low <= high:
            return lambda i, model: low <= i <= high
    raise ValueError(repr(text))


def _proper(model: Model) -> int:
    """Layers without those for multi-token prediction."""
    return model.layers - model.nextn


def _amount(number: str, divisor: str | None) -> Callable[[int], int]:
    """So many layers of n, or such a part of them."""
    return (lambda n: n * int(number) // int(divisor)) if divisor else (lambda n: int(number))


def _from_last(n: int, number: int, divisor: int) -> int:
    """The first of the last so many, or of the last such part."""
    return n * (divisor - number) // divisor if divisor else n - number
