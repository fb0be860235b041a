"""Rules: which block type each tensor of a model gets: a preset's mix, what the user wants otherwise, and what fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.mixes import Mix
from gguforge.quant.model import Model
from gguforge.quant.presets import UNQUANTIZED, Preset
from gguforge.quant.roles import Role, is_quantizable, layer, role
from gguforge.quant.rule_tables import RuleTable, Situation

FALLBACKS = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T["Q2_0"], T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
"""What rows that are no whole number of blocks get instead; if those do not fit either (blocks of 32), F16."""


@dataclass(frozen=True)
class Choice:
    """A type and the reason for it.

    Attributes:
        type: the type to write.
        reason: the rule in words.
        fallback: the type that the rule wanted, where rows are no whole number of its blocks.
    """

    type: T
    reason: str
    fallback: T | None = None


@dataclass(frozen=True)
class Overrides:
    """What the user wants otherwise than the preset.

    Attributes:
        pure: the base type for every tensor, no mix.
        keep_output: leave `output.weight` as it is.
        output, embedding: types of the output head and of the token embedding.
        patterns: regular expressions with the type of the tensors whose names they are found in; the first one counts.
        table: rules that go before those of the preset's mix.
    """

    pure: bool = False
    keep_output: bool = False
    output: T | None = None
    embedding: T | None = None
    patterns: tuple[tuple[re.Pattern[str], T], ...] = ()
    table: RuleTable | None = None


NEED_IMPORTANCE = frozenset({T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S})


def needs_importance(name: str, type: T) -> bool:
    """Whether a tensor of this type is garbage without an importance matrix; the embedding and the head never are."""
    return type in NEED_IMPORTANCE and role(name) not in (Role.TOKEN_EMBEDDING, Role.OUTPUT)


class TypeChooser:
    """Chooses the types of one model's tensors, which it must see in `file_order`: mixes count as they go.

    Args:
        preset: the preset.
        model: facts about the model.
        names: names of all its tensors.
        overrides: what the user wants otherwise.
        importance: whether there is an importance matrix.
    """

    def __init__(
        self,
        preset: Preset,
        model: Model,
        names: Sequence[str],
        overrides: Overrides = Overrides(),
        importance: bool = False,
    ) -> None:
        self.preset, self.model, self.overrides, self.importance = preset, model, overrides, importance
        self.mix = Mix(preset, model, names, importance)

    def choose(self, name: str, shape: Sequence[int], current: T) -> Choice:
        """The type of the next tensor; `current` is the type it has."""
        if not is_quantizable(name, shape, self.model.architecture):
            return Choice(current, "kept: no quantizable weight matrix")
        if name == "output.weight" and self.overrides.keep_output:
            return Choice(current, "kept: as asked")
        wanted, reason = self._wanted(name, shape, current)
        return self._fit(wanted, shape[-1], reason)

    def _wanted(self, name: str, shape: Sequence[int], current: T) -> tuple[T, str]:
        named = next((type for pattern, type in self.overrides.patterns if pattern.search(name)), None)
        match role(name):
            case Role.TOKEN_EMBEDDING if self.overrides.embedding is not None:
                if name == "token_embd.weight" or named is None:
                    return self.overrides.embedding, "embedding type as asked"
            case Role.OUTPUT if self.overrides.output is not None:
                return self.overrides.output, "output type as asked"
        if self.preset.base in UNQUANTIZED:
            return self.preset.base, "base type"
        if named is not None:
            return named, "type as asked"
        if self.overrides.pure:
            return self.preset.base, "base type"
        if self.overrides.output is not None and self.mix.tied and role(name) is Role.TOKEN_EMBEDDING:
            return self.overrides.output, "output type as asked, for the embedding that serves as output head"
        usual = self.mix.choose(name, shape)
        if self.overrides.table is None:
            return usual
        situation = Situation(name, layer(name), self.model, self.preset, self.mix.tied, self.importance)
        return self.overrides.table.choose(situation, usual, current)

    def _fit(self, wanted: T, row_length: int, reason: str) -> Choice:
        if row_length % GGML_QUANT_SIZES[wanted][0] == 0:
            return Choice(wanted, reason)
        fallback = FALLBACKS.get(wanted, wanted)
        if row_length % GGML_QUANT_SIZES[fallback][0]:
            fallback = T.F16
        return Choice(fallback, f"{reason}; rows of {row_length} are no whole {wanted.name} blocks", wanted)
