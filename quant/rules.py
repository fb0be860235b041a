"""Rules: which block type each tensor of a model gets under a preset, exactly as llama-quantize chooses.

The rules are frozen: they decide as src/llama-quant.cpp of llama.cpp does, and the files are byte for byte the same.
They go by a tensor's role (read from its name), its layer, and a few facts about the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T
from gguforge.quant.errors import InputError
from gguforge.quant.metadata import Value
from gguforge.quant.presets import UNQUANTIZED, Preset

FALLBACKS = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T["Q2_0"], T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
"""What rows that are no whole number of blocks get instead; if those do not fit either (blocks of 32), F16."""


class Role(Enum):
    """What a tensor does, as far as the rules care."""

    OUTPUT = auto()
    TOKEN_EMBEDDING = auto()
    VALUE = auto()  # attn_v, or a fused tensor that holds it
    KEY = auto()
    QUERY = auto()
    ATTENTION_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OTHER = auto()


ROLES = (
    ("attn_qkv.weight", Role.VALUE),
    ("attn_kv_b.weight", Role.VALUE),
    ("attn_v.weight", Role.VALUE),
    ("attn_k.weight", Role.KEY),
    ("attn_q.weight", Role.QUERY),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.FFN_UP),
    ("ffn_gate", Role.FFN_GATE),
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


GLM5_KEPT_PARTS = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
GLM5_Q8_PARTS = ("attn_q_a", "attn_q_b", "nextn.eh_proj")


def is_quantizable(name: str, shape: Sequence[int], architecture: str = "") -> bool:
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


@dataclass(frozen=True)
class Overrides:
    """What the user wants otherwise than the preset.

    Attributes:
        pure: the base type for every tensor, no mix.
        keep_output: leave `output.weight` as it is.
        output, embedding: types of the output head and of the token embedding.
        patterns: regular expressions with the type of the tensors whose names they are found in; the first one counts.
    """

    pure: bool = False
    keep_output: bool = False
    output: T | None = None
    embedding: T | None = None
    patterns: tuple[tuple[re.Pattern[str], T], ...] = ()


LOW_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
NEED_IMPORTANCE = frozenset({T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S})


def needs_importance(name: str, type: T) -> bool:
    """Whether a tensor of this type is garbage without an importance matrix; the embedding and the head never are."""
    return type in NEED_IMPORTANCE and role(name) not in (Role.TOKEN_EMBEDDING, Role.OUTPUT)


class TypeChooser:
    """Chooses the types of one model's tensors, which it must see in `file_order`: the rules count as they go.

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
        self.values = sum(role(name) is Role.VALUE for name in names)
        self.tied = "output.weight" not in names
        self.seen = dict.fromkeys(Role, 0)

    def choose(self, name: str, shape: Sequence[int], current: T) -> Choice:
        """The type of the next tensor; `current` is the type it has."""
        if not is_quantizable(name, shape, self.model.architecture):
            return Choice(current, "kept: no quantizable weight matrix")
        if name == "output.weight" and self.overrides.keep_output:
            return Choice(current, "kept: as asked")
        wanted, reason = self._wanted(name, shape)
        return self._fit(wanted, shape[-1], reason)

    def _wanted(self, name: str, shape: Sequence[int]) -> tuple[T, str]:
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
        return (self.preset.base, "base type") if self.overrides.pure else self._mix(name, shape)

    def _fit(self, wanted: T, row_length: int, reason: str) -> Choice:
        if row_length % GGML_QUANT_SIZES[wanted][0] == 0:
            return Choice(wanted, reason)
        fallback = FALLBACKS.get(wanted, wanted)
        if row_length % GGML_QUANT_SIZES[fallback][0]:
            fallback = T.F16
        return Choice(fallback, f"{reason}; rows of {row_length} are no whole {wanted.name} blocks", wanted)

    def _mix(self, name: str, shape: Sequence[int]) -> tuple[T, str]:
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
        if self.overrides.output is not None:
            return self.overrides.output
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
