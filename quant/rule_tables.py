"""Rule tables: types chosen by an ordered list of rules that people can read, copy and edit.

A table stands in front of llama.cpp's mixes (`gguforge.quant.mixes`). The first rule that applies to a tensor decides;
where none does, the mix does. How tables are written is in docs/rules.md, how they are read in
`gguforge.quant.rule_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.model import Model
from gguforge.quant.presets import Preset

LADDERS = (
    (T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0),
    (T.IQ1_M, T.IQ2_S, T.IQ3_S, T.IQ4_XS, T.Q5_K, T.Q6_K, T.Q8_0),
    (T.IQ1_S, T.IQ2_XXS, T.IQ3_XXS, T.IQ4_XS, T.Q5_K, T.Q6_K, T.Q8_0),
    (T.IQ1_M, T.IQ2_XS, T.IQ3_S, T.IQ4_XS, T.Q5_K, T.Q6_K, T.Q8_0),
    (T.IQ3_S, T.IQ4_NL, T.Q5_K, T.Q6_K, T.Q8_0),
    (T.Q4_0, T.Q5_0, T.Q6_K, T.Q8_0),
    (T.Q4_1, T.Q5_1, T.Q6_K, T.Q8_0),
)
"""What a step up or down is: about one bit a weight. A type climbs the first ladder that it is on."""


def climb(base: T, steps: int) -> T | None:
    """The type so many rungs above `base` (below if negative), at most the last rung; None for types on no ladder.

    >>> climb(T.IQ2_XXS, 2).name, climb(T.Q6_K, 5).name
    ('IQ4_XS', 'Q8_0')
    """
    for ladder in LADDERS:
        if base in ladder:
            return ladder[max(0, min(len(ladder) - 1, ladder.index(base) + steps))]
    return None


def bits(type: T) -> float:
    """Bits per weight."""
    size, nbytes = GGML_QUANT_SIZES[type]
    return 8 * nbytes / size


@dataclass(frozen=True)
class Target:
    """A type, or so many steps from the preset's base type."""

    type: T | None = None
    steps: int = 0

    def resolve(self, base: T) -> T | None:
        """The type under a preset; None where its base type is on no ladder."""
        return climb(base, self.steps) if self.type is None else self.type


@dataclass(frozen=True)
class Situation:
    """What rules ask about a tensor: its name and layer (-1 for none), the model, and what is being made.

    Attributes:
        tied: whether the token embedding serves as the output head.
        importance: whether there is an importance matrix.
    """

    name: str
    layer: int
    model: Model
    preset: Preset
    tied: bool = False
    importance: bool = False


Test = Callable[[Situation], bool]


@dataclass(frozen=True)
class Rule:
    """Types for the tensors that pass all tests.

    Attributes:
        number: its place in the table, from 1.
        reason: why, in words.
        tests: what must hold.
        keep: leave the type that the tensor has.
        type: exactly this type.
        at_least, at_most: bounds for the type that would be chosen without the rule.
    """

    number: int
    reason: str
    tests: tuple[Test, ...]
    keep: bool = False
    type: Target | None = None
    at_least: Target | None = None
    at_most: Target | None = None

    def applies(self, situation: Situation) -> bool:
        """Whether a tensor passes all tests."""
        return all(test(situation) for test in self.tests)

    def decide(self, usual: T, base: T, current: T) -> T:
        """The type, given the one without the rule, the preset's base type, and the type that the tensor has."""
        if self.keep:
            return current
        exact, low, high = (
            None if target is None else target.resolve(base) for target in (self.type, self.at_least, self.at_most)
        )
        if exact is not None:
            return exact
        if low is not None and bits(usual) < bits(low):
            return low
        return high if high is not None and bits(usual) > bits(high) else usual


@dataclass(frozen=True)
class RuleTable:
    """An ordered list of rules; the first that applies decides.

    Attributes:
        name: what `--explain` calls it.
        rules: the rules.
        plain: whether tensors without a rule get the preset's base type, not what llama.cpp's mix gives them.
    """

    name: str
    rules: tuple[Rule, ...]
    plain: bool = False

    def choose(self, situation: Situation, usual: tuple[T, str], current: T) -> tuple[T, str]:
        """The type of a tensor and the reason for it, given those of llama.cpp's mix."""
        base = situation.preset.base
        type, reason = (base, "base type") if self.plain else usual
        rule = next((rule for rule in self.rules if rule.applies(situation)), None)
        if rule is None:
            return type, reason
        decided = rule.decide(type, base, current)
        named = f"rule {rule.number} of {self.name}"
        return decided, f"{reason}; {named} asks no more" if decided == type else f"{named}: {rule.reason}"
