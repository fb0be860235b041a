"""A type for every tensor so that the file fits a budget and the damage is least.

Damages are taken to add up; where they come from is the caller's matter. The choice is exact to the byte: first the
tensors walk along their convex hulls, cheapest damage per byte first (the Lagrangian solution), then single changes and
pairs of changes use what is left of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError


@dataclass(frozen=True)
class Option:
    """One type that a tensor could have.

    Attributes:
        type: the type.
        nbytes: bytes of the tensor in it, padding included.
        damage: what it costs in quality, in any unit that adds up.
    """

    type: T
    nbytes: int
    damage: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The choice of least damage whose bytes stay within the budget.

    Args:
        options: what each tensor could be, at least one each.
        budget: bytes for all of them.

    Raises:
        InputError: even the smallest choice is larger.

    Example:
        >>> small, large = Option(T.Q2_K, 84, 5.0), Option(T.Q6_K, 210, 1.0)
        >>> found = allocate({"a": [small, large], "b": [small, Option(T.Q6_K, 210, 4.0)]}, 300)
        >>> found["a"].type.name, found["b"].type.name
        ('Q6_K', 'Q2_K')
    """
    hulls = {name: hull(some) for name, some in options.items()}
    chosen = {name: lower[0] for name, lower in hulls.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise InputError(
            "the model does not fit the size, even in the smallest types",
            expected=f"at least {budget - left} bytes for the weights", found=f"{budget} beside the metadata",
            remedy="Allow more bytes, or start from a smaller model.",
        )  # fmt: skip
    steps = sorted(
        ((a.damage - b.damage) / (b.nbytes - a.nbytes), name, b)
        for name, lower in hulls.items()
        for a, b in pairwise(lower)
    )
    blocked = set()
    for _, name, better in reversed(steps):  # along each hull gains fall, so its steps come in order
        cost = better.nbytes - chosen[name].nbytes
        if name in blocked or cost > left:
            blocked.add(name)
            continue
        chosen[name], left = better, left - cost
    return _use_up(options, chosen, left)


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, smallest first: each further step gains less damage a byte than the one before.

    >>> [o.nbytes for o in hull([Option(T.Q2_K, 1, 9), Option(T.Q3_K, 2, 8.9), Option(T.Q4_K, 3, 1)])]
    [1, 3]
    """
    lower: list[Option] = []
    for option in sorted(options, key=lambda one: (one.nbytes, one.damage)):
        if lower and option.damage >= lower[-1].damage:
            continue
        while len(lower) > 1 and _gain(lower[-2], lower[-1]) <= _gain(lower[-2], option):
            lower.pop()
        lower.append(option)
    return lower


def _gain(a: Option, b: Option) -> float:
    return (a.damage - b.damage) / (b.nbytes - a.nbytes) if b.nbytes > a.nbytes else float("inf")


def _use_up(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Improve by single changes, and by one tensor made smaller for the sake of another, while there are any."""
    while True:
        moves = [
            (option.damage - chosen[name].damage, option.nbytes - chosen[name].nbytes, name, option)
            for name, some in options.items()
            for option in some
            if option != chosen[name]
        ]
        better = [move for move in moves if move[0] < 0]
        smaller = sorted((move for move in moves if move[1] < 0), key=lambda move: move[0])
        best: tuple[float, list[tuple[str, Option]], int] = (0.0, [], 0)
        for damage, cost, name, option in better:
            if cost <= left:
                best = min(best, (damage, [(name, option)], cost), key=lambda one: one[0])
                continue
            for loss, freed, other, given in smaller:
                if damage + loss >= best[0]:
                    break
                if other != name and cost + freed <= left:
                    best = damage + loss, [(name, option), (other, given)], cost + freed
                    break
        if not best[1]:
            return chosen
        chosen.update(best[1])
        left -= best[2]
