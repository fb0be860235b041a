"""Presets: which block type each tensor gets, exactly as llama.cpp's llama-quantize chooses.

A preset (llama.cpp: "ftype") has a base type and a few tensors that get another one, by role, layer and model. The
rules are frozen: they decide as src/llama-quant.cpp does, and the files are byte for byte the same. Presets of the IQ
types are not among them yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum, auto

from gguforge.quant.constants import GGML_QUANT_SIZES, LlamaFileType
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError
from gguforge.quant.metadata import Value


@dataclass(frozen=True)
class Preset:
    """A named mix of block types.

    Attributes:
        name: its canonical name, e.g. Q4_K_M.
        file_type: the number in `general.file_type`.
        base: the type of every tensor that no rule lifts or lowers.
    """

    name: str
    file_type: LlamaFileType
    base: T


F = LlamaFileType
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("F32", F.ALL_F32, T.F32),
        Preset("F16", F.MOSTLY_F16, T.F16),
        Preset("BF16", F.MOSTLY_BF16, T.BF16),
        Preset("Q8_0", F.MOSTLY_Q8_0, T.Q8_0),
        Preset("Q6_K", F.MOSTLY_Q6_K, T.Q6_K),
        Preset("Q5_K_M", F.MOSTLY_Q5_K_M, T.Q5_K),
        Preset("Q5_K_S", F.MOSTLY_Q5_K_S, T.Q5_K),
        Preset("Q5_1", F.MOSTLY_Q5_1, T.Q5_1),
        Preset("Q5_0", F.MOSTLY_Q5_0, T.Q5_0),
        Preset("Q4_K_M", F.MOSTLY_Q4_K_M, T.Q4_K),
        Preset("Q4_K_S", F.MOSTLY_Q4_K_S, T.Q4_K),
        Preset("Q4_1", F.MOSTLY_Q4_1, T.Q4_1),
        Preset("Q4_0", F.MOSTLY_Q4_0, T.Q4_0),
        Preset("Q3_K_L", F.MOSTLY_Q3_K_L, T.Q3_K),
        Preset("Q3_K_M", F.MOSTLY_Q3_K_M, T.Q3_K),
        Preset("Q3_K_S", F.MOSTLY_Q3_K_S, T.Q3_K),
        Preset("Q2_K", F.MOSTLY_Q2_K, T.Q2_K),
        Preset("Q2_K_S", F.MOSTLY_Q2_K_S, T.Q2_K),
    )
}
"""Every preset, best first."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
UNQUANTIZED = frozenset({T.F32, T.F16, T.BF16})

FALLBACKS = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}
"""What rows that are no multiple of 256 get instead; rows that are no multiple of 32 either get F16."""


def find_preset(name: str) -> Preset:
    """A preset by name, alias or llama.cpp number, in any case.

    Raises:
        InputError: no such preset; names the nearest.

    Example:
        >>> find_preset("q4_k").name, find_preset("18").name
        ('Q4_K_M', 'Q6_K')
    """
    key = name.strip().upper()
    key = ALIASES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    for preset in PRESETS.values():
        if key == str(int(preset.file_type)):
            return preset
    near = get_close_matches(key, [*PRESETS, *ALIASES], 3, 0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(PRESETS)}."
    raise InputError(f"unknown type {name!r}", remedy=remedy)


class Role(Enum):
    """What a tensor does, as far as the rules care."""

    OUTPUT = auto()
    TOKEN_EMBEDDING = auto()
    VALUE = auto()  # attn_v, or a fused tensor that holds it
    KEY = auto()
    ATTENTION_OUTPUT = auto()
    FFN_DOWN = auto()
    OTHER = auto()


ROLES = (
    ("attn_qkv.weight", Role.VALUE),
    ("attn_kv_b.weight", Role.VALUE),
    ("attn_v.weight", Role.VALUE),
    ("attn_k.weight", Role.KEY),
    ("attn_q.weight", Role.OTHER),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.OTHER),
    ("ffn_gate", Role.OTHER),
    ("ffn_down", Role.FFN_DOWN),
)
"""Parts of names in the order in which they are looked for."""


def role(name: str) -> Role:
    """The role of a tensor by its name."""
    if name == "output.weight":
        return Role.OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Role.TOKEN_EMBEDDING
    return next((found for part, found in ROLES if part in name), Role.OTHER)


def layer(name: str) -> int:
    """The layer a tensor belongs to, -1 for none.

    >>> layer("blk.12.attn_q.weight")
    12
    """
    match = re.match(r"blk\.(-?\d+)", name)
    return int(match[1]) if match else -1


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama-quantize orders tensors: layer, then name."""
    return layer(name), name


KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
"""Tensors with one of these in their name keep their type: small, or too sensitive."""
KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether any preset changes the type of a tensor: a weight matrix that is on no list."""
    matrix = len(shape) >= 2 and any(size > 1 for size in shape[:-1])
    return (
        matrix and name.endswith("weight") and name not in KEPT_NAMES and not any(part in name for part in KEPT_PARTS)
    )


SEVENTY_B_LAYERS = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model.

    Attributes:
        architecture: `general.architecture`.
        layers: number of layers.
        gqa: query heads per key/value head, in layer 0.
        experts: number of experts, 0 if dense.
    """

    architecture: str
    layers: int
    gqa: int
    experts: int

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Value]) -> Model:
        """Read them from GGUF metadata.

        Raises:
            InputError: a key that every model has is missing.
        """
        architecture = metadata.get("general.architecture")
        if architecture is None:
            raise InputError("the file has no general.architecture: it is no model", remedy="Convert the model again.")
        name = str(architecture.value)
        heads = _number(metadata, f"{name}.attention.head_count", 1)
        heads_kv = _number(metadata, f"{name}.attention.head_count_kv", heads)
        layers = _number(metadata, f"{name}.block_count", 0)
        return cls(name, layers, heads // heads_kv if heads_kv else 0, _number(metadata, f"{name}.expert_count", 0))

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model, whose few value heads deserve more bits."""
        return SEVENTY_B_LAYERS.get(self.architecture) == self.layers and (
            self.architecture != "llama" or self.gqa != 1
        )


def _number(metadata: Mapping[str, Value], key: str, default: int) -> int:
    value = metadata[key].value if key in metadata else default
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else default


def use_more_bits(i: int, n: int) -> bool:
    """The layers that get more bits in the M mixes: the first and last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


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


class TypeChooser:
    """Chooses the types of one model's tensors, which it must see in `file_order`: the rules count as they go."""

    def __init__(self, preset: Preset, model: Model, names: Sequence[str]) -> None:
        self.preset, self.model = preset, model
        self.values = sum(role(name) is Role.VALUE for name in names)
        self.tied = "output.weight" not in names
        self.value_index = self.down_index = 0

    def choose(self, name: str, shape: Sequence[int], current: T) -> Choice:
        """The type of the next tensor; `current` is the type it has."""
        if not is_quantizable(name, shape):
            return Choice(current, "kept: no quantizable weight matrix")
        if self.preset.base in UNQUANTIZED:
            return Choice(self.preset.base, "base type")
        wanted, reason = self._mix(name, shape[-1])
        return self._fit(wanted, shape[-1], reason)

    def _fit(self, wanted: T, row_length: int, reason: str) -> Choice:
        if row_length % GGML_QUANT_SIZES[wanted][0] == 0:
            return Choice(wanted, reason)
        fallback = FALLBACKS.get(wanted, wanted)
        if row_length % GGML_QUANT_SIZES[fallback][0]:
            fallback = T.F16
        return Choice(fallback, f"{reason}; rows of {row_length} are no whole {wanted.name} blocks", wanted)

    def _mix(self, name: str, row_length: int) -> tuple[T, str]:
        base = self.preset.base
        match role(name):
            case Role.OUTPUT:
                return self._output(row_length), "output head"
            case Role.TOKEN_EMBEDDING if self.tied:
                return self._output(row_length), "embedding that is also the output head"
            case Role.VALUE:
                self.value_index += 1
                return self._value(self.value_index - 1), "attention value"
            case Role.KEY if self.model.experts == 8:
                return T.Q8_0, "attention key of an 8-expert model"
            case Role.FFN_DOWN:
                self.down_index += 1
                return self._down(self._down_layer(name)), "feed-forward down"
            case Role.ATTENTION_OUTPUT:
                return self._attention_output(), "attention output"
            case _:
                return base, "base type"

    def _output(self, row_length: int) -> T:
        base = self.preset.base
        if self.model.architecture == "falcon" or row_length % GGML_QUANT_SIZES[base][0]:
            return T.Q8_0
        return base if base == T.Q8_0 else T.Q6_K

    def _value(self, i: int) -> T:
        new = self.preset.base
        shared = self.model.gqa >= 4
        match self.preset.name:
            case "Q2_K":
                new = T.Q4_K if shared else T.Q3_K
            case "Q2_K_S" if shared:
                new = T.Q4_K
            case "Q3_K_M":
                new = T.Q5_K if i < 2 else T.Q4_K
            case "Q3_K_L":
                new = T.Q5_K
            case "Q4_K_M" | "Q5_K_M" if use_more_bits(i, self.values):
                new = T.Q6_K
            case "Q4_K_S" if i < 4:
                new = T.Q5_K
        if self.model.is_70b and new in (T.Q3_K, T.Q4_K):
            new = T.Q5_K
        return T.Q8_0 if self.model.experts == 8 else new

    def _down_layer(self, name: str) -> int:
        """Experts are not in order in every file, so the layer of theirs is read from the name."""
        if self.model.experts <= 1:
            return self.down_index - 1
        found = layer(name)
        if not 0 <= found < self.model.layers:
            raise InputError(f"tensor {name!r} belongs to no layer", expected=f"blk.0 to blk.{self.model.layers - 1}")
        return found

    def _down(self, i: int) -> T:
        n, falcon = self.model.layers, self.model.architecture == "falcon"
        more = use_more_bits(i, n)
        match self.preset.name:
            case "Q2_K":
                return T.Q3_K
            case "Q2_K_S" if i < n // 8:
                return T.Q4_K
            case "Q3_K_M":
                return T.Q5_K if i < n // 16 else T.Q4_K if more or not falcon else T.Q3_K
            case "Q3_K_L":
                return T.Q4_K if falcon else T.Q5_K
            case "Q4_K_M" if falcon:
                return T.Q6_K if i < n // 16 else T.Q5_K if more else T.Q4_K
            case "Q4_K_M" | "Q5_K_M" if more:
                return T.Q6_K
            case "Q4_K_S" if i < n // 8 and not falcon:
                return T.Q5_K
        return self.preset.base

    def _attention_output(self) -> T:
        name = self.preset.name
        if self.model.architecture == "falcon":
            return T.Q4_K if name == "Q3_K_L" else self.preset.base
        if self.model.experts == 8:
            lifted = name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
            return T.Q5_K if lifted else self.preset.base
        return {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K}.get(name, self.preset.base)
