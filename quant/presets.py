"""Presets: the named mixes of block types that llama.cpp calls "ftype".

Which type each tensor of a model gets under a preset is decided in `gguforge.quant.mixes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.constants import LlamaFileType
from gguforge.quant.errors import InputError


@dataclass(frozen=True)
class Preset:
    """A named mix of block types.

    Attributes:
        name: its canonical name, e.g. Q4_K_M.
        file_type: the number in `general.file_type`.
        base: the type of every tensor that no rule lifts or lowers.
    """

    name: str
    file_type: int
    base: T


F = LlamaFileType
PRESETS: dict[str, Preset] = {
    name: Preset(name, int(file_type), base)
    for name, file_type, base in (
        ("F32", F.ALL_F32, T.F32),
        ("F16", F.MOSTLY_F16, T.F16),
        ("BF16", F.MOSTLY_BF16, T.BF16),
        ("Q8_0", F.MOSTLY_Q8_0, T.Q8_0),
        ("Q6_K", F.MOSTLY_Q6_K, T.Q6_K),
        ("Q5_K_M", F.MOSTLY_Q5_K_M, T.Q5_K),
        ("Q5_K_S", F.MOSTLY_Q5_K_S, T.Q5_K),
        ("Q5_1", F.MOSTLY_Q5_1, T.Q5_1),
        ("Q5_0", F.MOSTLY_Q5_0, T.Q5_0),
        ("Q4_K_M", F.MOSTLY_Q4_K_M, T.Q4_K),
        ("Q4_K_S", F.MOSTLY_Q4_K_S, T.Q4_K),
        ("Q4_1", F.MOSTLY_Q4_1, T.Q4_1),
        ("Q4_0", F.MOSTLY_Q4_0, T.Q4_0),
        ("IQ4_NL", F.MOSTLY_IQ4_NL, T.IQ4_NL),
        ("IQ4_XS", F.MOSTLY_IQ4_XS, T.IQ4_XS),
        ("MXFP4_MOE", F.MOSTLY_MXFP4_MOE, T.MXFP4),
        ("Q3_K_L", F.MOSTLY_Q3_K_L, T.Q3_K),
        ("Q3_K_M", F.MOSTLY_Q3_K_M, T.Q3_K),
        ("Q3_K_S", F.MOSTLY_Q3_K_S, T.Q3_K),
        ("IQ3_M", F.MOSTLY_IQ3_M, T.IQ3_S),
        ("IQ3_S", F.MOSTLY_IQ3_S, T.IQ3_S),
        ("IQ3_XS", F.MOSTLY_IQ3_XS, T.IQ3_S),
        ("IQ3_XXS", F.MOSTLY_IQ3_XXS, T.IQ3_XXS),
        ("Q2_K", F.MOSTLY_Q2_K, T.Q2_K),
        ("Q2_K_S", F.MOSTLY_Q2_K_S, T.Q2_K),
        ("IQ2_M", F.MOSTLY_IQ2_M, T.IQ2_S),
        ("IQ2_S", F.MOSTLY_IQ2_S, T.IQ2_XS),
        ("IQ2_XS", F.MOSTLY_IQ2_XS, T.IQ2_XS),
        ("IQ2_XXS", F.MOSTLY_IQ2_XXS, T.IQ2_XXS),
        ("Q2_0", 41, T["Q2_0"]),  # newer than the names of the gguf package
        ("TQ2_0", F.MOSTLY_TQ2_0, T.TQ2_0),
        ("IQ1_M", F.MOSTLY_IQ1_M, T.IQ1_M),
        ("TQ1_0", F.MOSTLY_TQ1_0, T.TQ1_0),
        ("IQ1_S", F.MOSTLY_IQ1_S, T.IQ1_S),
        ("Q1_0", F.MOSTLY_Q1_0, T.Q1_0),
    )
}
"""Every preset of llama-quantize, most bits first."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
UNQUANTIZED = frozenset({T.F32, T.F16, T.BF16})


def find_preset(name: str) -> Preset:
    """A preset by name, alias or llama.cpp number, in any case.

    Raises:
        InputError: no such preset; names the nearest, or all.

    Example:
        >>> find_preset("q4_k").name, find_preset("18").name
        ('Q4_K_M', 'Q6_K')
    """
    key = name.strip().upper()
    key = ALIASES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    for preset in PRESETS.values():
        if key == str(preset.file_type):
            return preset
    if key.isdecimal():
        known = ", ".join(f"{preset.file_type} {preset.name}" for preset in PRESETS.values())
        raise InputError(f"no type has the number {key}", remedy=f"Known: {known}.")
    near = get_close_matches(key, [*PRESETS, *ALIASES], 3, 0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PRESETS)}."
    raise InputError(f"unknown type {name!r}", remedy=remedy)
