"""Facts about a model that its metadata tell and rules ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguforge.quant.errors import InputError
from gguforge.quant.metadata import Value

SEVENTY_B_LAYERS = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model.

    Attributes:
        architecture: `general.architecture`.
        layers: number of layers.
        gqa: query heads per key/value head, in layer 0.
        experts: number of experts, 0 if dense.
        nextn: how many of the layers, the last ones, predict further tokens (multi-token prediction).
    """

    architecture: str
    layers: int
    gqa: int
    experts: int
    nextn: int = 0

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
        experts = _number(metadata, f"{name}.expert_count", 0)
        nextn = _number(metadata, f"{name}.nextn_predict_layers", 0)
        return cls(name, layers, heads // heads_kv if heads_kv else 0, experts, nextn)

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
