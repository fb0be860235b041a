"""How the next token is drawn: the settings, where their defaults come from, and llama.cpp's chain that does it.

Built-in defaults are llama.cpp's own; a file's `general.sampling.*` keys overrule them, and the user overrules both.
Mirostat and custom sampler orders are not supported; a file that asks for them gets a remark.
Keys: llama.cpp, src/llama-arch.cpp (general.sampling.*).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from gguforge.quant.errors import GGUFError, InputError
from gguforge.quant.metadata import Value

_FILE_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "penalty_repeat",
    "repeat_last_n": "penalty_last_n",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
}
_UNSUPPORTED = ("sequence", "mirostat")
_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 20),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (0, 1 << 20),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together reach this probability; 1 for all.
        min_p: only tokens at least this likely, relative to the most likely one; 0 for all.
        repeat_penalty: divides the logits of recent tokens; 1 for none.
        repeat_last_n: how many tokens are recent.
        xtc_probability, xtc_threshold: exclude top choices; probability 0 for never.
        seed: makes an answer repeatable; None draws one.

    Raises:
        InputError: a value is out of its range.

    Example:
        >>> Sampling(temperature=0.5).top_k
        40
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InputError(f"sampling: {name} is out of range", expected=f"{low} to {high}", found=value)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Value]) -> Sampling:
        """The defaults with the file's own `general.sampling.*` in their place.

        Raises:
            GGUFError: a key holds something that is not a number, or out of range.
        """
        own: dict[str, float | int] = {}
        for name, key in _FILE_KEYS.items():
            entry = metadata.get(f"general.sampling.{key}")
            if entry is None:
                continue
            if isinstance(entry.value, bool) or not isinstance(entry.value, int | float):
                raise GGUFError(f"general.sampling.{key} is not a number", found=repr(entry.value)[:60])
            if not math.isfinite(entry.value):
                raise GGUFError(f"general.sampling.{key} is not finite", found=entry.value)
            own[name] = int(entry.value) if isinstance(getattr(cls, name), int) else float(entry.value)
        if own.get("repeat_last_n") == -1:
            own["repeat_last_n"] = 1 << 20  # llama.cpp's word for the whole context
        if own.get("top_k", 0) < 0:
            own["top_k"] = 0  # llama.cpp takes any k below 1 as "all"
        return cls(**own)  # type: ignore[arg-type]  # values were converted to the field's type above

    def changed(self, **given: float | int | None) -> Sampling:
        """A copy with every setting that is not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def seeded(self) -> Sampling:
        """A copy whose seed is a number that can be told."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32 - 1))

    def as_dict(self) -> dict[str, float | int | None]:
        """The settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


GREEDY = Sampling(temperature=0.0, seed=0)
"""Always the most likely token."""


def unsupported_settings(metadata: Mapping[str, Value]) -> list[str]:
    """Keys by which the file asks for a way of sampling that is not supported here."""
    keys = [f"general.sampling.{name}" for name in _UNSUPPORTED]
    return [key for key in keys if key in metadata and metadata[key].value not in (0, "")]


class Sampler:
    """llama.cpp's sampler chain for the settings; the whole draw happens in C.

    The order is llama.cpp's: penalties, top-k, top-p, min-p, XTC, temperature, draw.
    """

    def __init__(self, settings: Sampling, n_vocab: int) -> None:
        import llama_cpp.llama_cpp as llama

        self.settings = settings.seeded()
        self._llama = llama
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for link in _links(self.settings, n_vocab, llama):
            llama.llama_sampler_chain_add(self.chain, link)

    def remember(self, tokens: list[int]) -> None:
        """Count tokens of the prompt as recent, so that the penalty sees them."""
        if self.settings.repeat_penalty != 1.0 and self.settings.repeat_last_n:
            for token in tokens[-self.settings.repeat_last_n :]:
                self._llama.llama_sampler_accept(self.chain, token)

    def close(self) -> None:
        """Free the chain; a second call does nothing."""
        if self.chain is not None:
            self._llama.llama_sampler_free(self.chain)
            self.chain = None


def _links(settings: Sampling, n_vocab: int, llama: object) -> list[object]:
    make = {name: getattr(llama, f"llama_sampler_init_{name}") for name in
            ("penalties", "greedy", "top_k", "top_p", "min_p", "xtc", "temp", "dist")}  # fmt: skip
    assert settings.seed is not None
    chain = []
    if settings.repeat_penalty != 1.0 and settings.repeat_last_n:
        chain.append(make["penalties"](n_vocab, settings.repeat_last_n, settings.repeat_penalty, 0.0, 0.0))
    if settings.temperature == 0.0:
        return [*chain, make["greedy"]()]
    if settings.top_k:
        chain.append(make["top_k"](settings.top_k))
    if settings.top_p < 1.0:
        chain.append(make["top_p"](settings.top_p, 1))
    if settings.min_p > 0.0:
        chain.append(make["min_p"](settings.min_p, 1))
    if settings.xtc_probability > 0.0:
        chain.append(make["xtc"](settings.xtc_probability, settings.xtc_threshold, 1, settings.seed % 2**32))
    return [*chain, make["temp"](settings.temperature), make["dist"](settings.seed % 2**32)]
