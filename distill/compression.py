"""How DistillKit compresses a row of log-probabilities, from compression_config.yaml to the numbers.

The first `exact_k` are kept as they are, the rest as a sum of a few functions of the rank plus residuals in bins that
share a scale; ids bit by bit from the highest. Sums are made in float32; DistillKit uses the terms' type.
Format: https://github.com/arcee-ai/DistillKit, distillkit/compression.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.shards import Floats
from gguforge.quant.errors import InputError, MissingExtraError

CONFIG = "compression_config.yaml"
_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}

Bytes = NDArray[np.uint8]


def load(package: str) -> Any:
    """Import a package of the extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise MissingExtraError(package.split(".")[0], "parquet") from None


@dataclass(frozen=True)
class Bin:
    """Residuals that share a scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """What compression_config.yaml says, in its words: `d` is the vocabulary, `k` the ids of a row."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return math.ceil(math.log2(self.d))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's log-probabilities."""
        bits = self.exact_k * _BITS[self.exact_dtype] + len(self.polynomial_terms) * _BITS[self.term_dtype]
        bins = (_BITS[b.scale_dtype] + 8 * -(-b.element_bits * b.num_elements // 8) for b in self.residual_bins)
        return -(-(bits + sum(bins)) // 8)


def read_compression(path: Path) -> Compression:
    """Read a compression_config.yaml.

    Raises:
        InputError: it is missing, damaged or of the older layout.
    """
    if not path.is_file():
        raise InputError(f"{CONFIG} is missing", path=path.parent, remedy="Give a folder that DistillKit captured.")
    yaml = load("yaml")
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
        bins = tuple(Bin(**entry) for entry in found.pop("residual_bins", None) or ())
        terms = tuple(found.pop("polynomial_terms", None) or ())
        found.pop("error_diffusion", None)  # how it was written; reading is the same
        made = Compression(**found, polynomial_terms=terms, residual_bins=bins)
        known = {made.exact_dtype, made.term_dtype, *(b.scale_dtype for b in bins)} <= set(_BITS)
        sound = 2 <= made.d < 2**31 and 0 <= made.exact_k <= made.k <= made.d and made.k > 0
        sound &= all(0 < b.element_bits <= 32 and 0 < b.num_elements <= made.k for b in bins)
        sound &= (
            all(type(term) is int or term in _TERMS for term in terms) and sum(b.num_elements for b in bins) <= made.k
        )
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"is not understood: {str(error).splitlines()[0]}", path=path) from None
    if not known or not sound:
        raise InputError("its numbers make no sense, or name an unknown type", path=path)
    return made


def decode_log_probs(rows: Bytes, config: Compression) -> Floats:
    """Log-probabilities of rows, shape (rows, `row_bytes`) -> (rows, k)."""
    at = 0

    def take(nbytes: int) -> Bytes:
        nonlocal at
        at += nbytes
        return np.ascontiguousarray(rows[:, at - nbytes : at])

    exact = _floats(take(config.exact_k * _BITS[config.exact_dtype] // 8), config.exact_dtype)
    rest = np.zeros((len(rows), config.k - config.exact_k), np.float32)
    if config.polynomial_terms:
        factors = _floats(take(len(config.polynomial_terms) * _BITS[config.term_dtype] // 8), config.term_dtype)
        rest += (factors.astype(np.float64) @ _functions(config).T).astype(np.float32)
    done = 0
    for b in config.residual_bins:
        scale = _floats(take(_BITS[b.scale_dtype] // 8), b.scale_dtype)
        codes = unpack(take(-(-b.element_bits * b.num_elements // 8)), b.element_bits, b.num_elements)
        steps = 2 * codes - 1 if b.element_bits == 1 else codes - (1 << (b.element_bits - 1))
        rest[:, done : done + b.num_elements] += steps * scale
        done += b.num_elements
    whole = np.concatenate([exact, rest], axis=1)
    return np.cumsum(whole, axis=1, dtype=np.float32) if config.delta_encoding else whole


def _functions(config: Compression) -> NDArray[np.float64]:
    """The terms' values, shape (ranks, terms)."""
    count = config.k - config.exact_k
    rank = np.linspace(0, 1, count) if config.normalize_t else np.arange(count, dtype=np.float64)
    return np.stack([rank**t if isinstance(t, int) else _TERMS[t](rank) for t in config.polynomial_terms], axis=-1)


def _floats(data: Bytes, dtype: str) -> Floats:
    """Stored floats, shape (rows, bytes) -> (rows, numbers)."""
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view(np.dtype(dtype).newbyteorder("<")).astype(np.float32)


def unpack(data: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    """Integers of so many bits, highest bit first, shape (rows, bytes) -> (rows, count)."""
    flags = np.unpackbits(data, axis=1)[:, : bits * count].reshape(len(data), count, bits)
    return flags.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def pack(values: NDArray[np.int64], bits: int) -> Bytes:
    """The inverse of `unpack`."""
    flags = values[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(flags.astype(np.uint8).reshape(len(values), -1), axis=1)
