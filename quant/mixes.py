"""Mixes: the types that llama.cpp's presets give the tensors of a model, exactly as llama-quantize chooses.

The rules are frozen: they decide as src/llama-quant.cpp of llama.cpp does, and the files are byte for byte the same.
They go by a tensor's role, its layer, and a few facts about the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError
from gguforge.quant.model import Model
from gguforge.quant.presets import Preset
from gguforge.quant.roles import Role, layer, role

LOW_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
GLM5_Q8_PARTS = ("attn_q_a", "attn_q_b", "nextn.eh_proj")


def use_more_bits(i: int, n: int) -> bool:
    """The layers that get more bits in the M mixes: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


class Mix:
    """The types of one model's tensors, which it must see in `file_order`: the rules count as they go.

    Args:
        preset: the preset.
        model: facts about the model.
        names: names of all its tensors.
        importance: whether there is an importance matrix.
    """

    def __init__(self, preset: Preset, model: Model, names: Sequence[str], importance: bool = False) -> None:
        self.preset, self.model, self.importance = preset, model, importance
        self.values = sum(role(name) is Role.VALUE for name in names)
        self.tied = "output.weight" not in names
        self.seen = dict.fromkeys(Role, 0)

    def choose(self, name: str, shape: Sequence[int]) -> tuple[T, str]:
        """The type of the next tensor, and the rule in words."""
        kind, base = role(name), self.preset.base
        if self.model.architecture == "glm5-next" and any(part in name for part in GLM5_Q8_PARTS):
            return T.Q8_0, "never below Q8_0 in this architecture"
        if kind is Role.OUTPUT or (kind is Role.TOKEN_EMBEDDING and self.tied):
            return self._output(shape[-1]), "output head, or the embedding that serves as one"
        if self.preset.name == "MXFP4_MOE":
            return self._mxfp4(kind, shape), "experts in MXFP4, all else in Q8_0"
        if kind is Role.TOKEN_EMBEDDING:
            return self._embedding(), "token embedding"
        index = self._index(kind, name)
        if self.preset.name in LOW_BITS:
            return self._low_bits(kind, index), f"low-bit mix: {kind.name.lower().replace('_', ' ')}"
        match kind:
            case Role.VALUE:
                return self._value(index), "attention value"
            case Role.KEY | Role.QUERY:
                return self._key_or_query(kind), "attention key or query"
            case Role.FFN_DOWN:
                return self._down(index), "feed-forward down"
            case Role.ATTENTION_OUTPUT:
                return self._attention_output(), "attention output"
            case Role.FFN_UP | Role.FFN_GATE:
                return self._up_or_gate(index), "feed-forward up or gate"
            case _:
                return base, "base type"

    def _index(self, kind: Role, name: str) -> int:
        """The how-manieth of its role a tensor is. Experts come in any order, so their layer is read from the name."""
        index = self.seen[kind]
        self.seen[kind] += 1
        by_name = kind in (Role.FFN_DOWN, Role.FFN_UP, Role.FFN_GATE) and self.preset.name not in LOW_BITS
        if self.model.experts <= 1 or not by_name:
            return index
        found = layer(name)
        if not 0 <= found < self.model.layers:
            raise InputError(f"tensor {name!r} belongs to no layer", expected=f"blk.0 to blk.{self.model.layers - 1}")
        return found

    def _output(self, row_length: int) -> T:
        base, name = self.preset.base, self.preset.name
        if name == "MXFP4_MOE" or self.model.architecture == "falcon" or row_length % GGML_QUANT_SIZES[base][0]:
            return T.Q8_0
        if name in LOW_BITS or name == "IQ3_XXS":
            return T.Q5_K
        return base if base == T.Q8_0 else T.Q6_K

    def _mxfp4(self, kind: Role, shape: Sequence[int]) -> T:
        experts = len(shape) > 2 and shape[-3] > 1
        if self.model.architecture == "bailingmoe3":  # its latent attention has three-dimensional tensors too
            experts = experts and kind in (Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN)
        return T.MXFP4 if experts else T.Q8_0

    def _embedding(self) -> T:
        match self.preset.name:
            case "IQ2_XXS" | "IQ2_XS" | "IQ1_S" | "IQ1_M":
                return T.Q2_K
            case "IQ2_S" | "IQ2_M" | "IQ3_XXS":
                return T.IQ3_S
            case "TQ1_0" | "TQ2_0" | "Q2_0":
                return T.Q4_K
        return self.preset.base

    def _low_bits(self, kind: Role, i: int) -> T:
        name, eight = self.preset.name, self.model.experts == 8
        better = T.IQ3_S if name in ("IQ2_S", "IQ2_M") else T.Q2_K
        match kind:
            case Role.VALUE:
                return T.Q4_K if self.model.gqa >= 4 or self.model.experts >= 4 else better
            case Role.KEY if eight:
                return T.Q4_K
            case Role.FFN_DOWN if i < self.model.layers // 8:
                return better
            case Role.ATTENTION_OUTPUT if eight:
                return T.Q5_K
            case Role.ATTENTION_OUTPUT if name in ("IQ1_S", "IQ1_M"):
                return T.IQ2_XXS
            case Role.ATTENTION_OUTPUT if name in ("IQ2_S", "IQ2_M"):
                return T.IQ3_S
        return self.preset.base

    def _value(self, i: int) -> T:
        new = self._value_of_mix(i)
        if self.model.is_70b and new in (T.Q3_K, T.Q4_K):
            new = T.Q5_K
        return T.Q8_0 if self.model.experts == 8 else new

    def _value_of_mix(self, i: int) -> T:
        shared = self.model.gqa >= 4
        match self.preset.name:
            case "Q2_K":
                return T.Q4_K if shared else T.Q3_K
            case "IQ3_XXS":
                return T.Q4_K if shared else T.IQ3_XXS if self.importance else T.IQ3_S
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if shared:
                return T.Q4_K
            case "IQ3_M":
                return T.Q4_K
            case "Q3_K_M":
                return T.Q5_K if i < 2 else T.Q4_K
            case "Q3_K_L":
                return T.Q5_K
            case "IQ4_NL" | "IQ4_XS" if shared:
                return T.Q5_K
            case "Q4_K_M" | "Q5_K_M" if use_more_bits(i, self.values):
                return T.Q6_K
            case "Q4_K_S" if i < 4:
                return T.Q5_K
        return self.preset.base

    def _key_or_query(self, kind: Role) -> T:
        if kind is Role.KEY and self.model.experts == 8:
            return T.Q8_0
        return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(self.preset.name, self.preset.base)

    def _down(self, i: int) -> T:
        n, falcon = self.model.layers, self.model.architecture == "falcon"
        more, first = use_more_bits(i, n), i < n // 8
        match self.preset.name:
            case "Q2_K":
                return T.Q3_K
            case "Q2_K_S" if first:
                return T.Q4_K
            case "IQ3_XXS" if not self.importance:
                return T.Q4_K if first else T.Q3_K
            case "Q3_K_M":
                return T.Q5_K if i < n // 16 else T.Q4_K if more or not falcon else T.Q3_K
            case "IQ3_M" if first or (self.model.experts == 8 and more):
                return T.Q4_K
            case "Q3_K_L":
                return T.Q4_K if falcon else T.Q5_K
            case "Q4_K_M" if falcon:
                return T.Q6_K if i < n // 16 else T.Q5_K if more else T.Q4_K
            case "Q4_K_M" | "Q5_K_M" if more:
                return T.Q6_K
            case "IQ4_NL" | "IQ4_XS" if first and not self.importance:
                return T.Q5_K
            case "Q4_K_S" if first and not falcon:
                return T.Q5_K
            case "Q4_0" if first and self.importance:
                return T.Q4_1
            case "Q5_0" if first and self.importance:
                return T.Q5_1
        return self.preset.base

    def _attention_output(self) -> T:
        name = self.preset.name
        if self.model.architecture == "falcon":
            return T.Q4_K if name == "Q3_K_L" else self.preset.base
        if self.model.experts == 8:
            lifted = name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") or name.startswith(("IQ3", "IQ4"))
            return T.Q5_K if lifted else self.preset.base
        mixes = {"Q2_K": T.Q3_K, "IQ3_XXS": T.IQ3_S, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_M": T.Q4_K}
        return mixes.get(name, self.preset.base)

    def _up_or_gate(self, i: int) -> T:
        middle = self.model.layers // 8 <= i < 7 * self.model.layers // 8
        return T.IQ3_XXS if self.preset.name == "IQ3_XS" and middle else self.preset.base
