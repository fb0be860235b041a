"""Whether a model fits the memory, and the largest context that does, from the file's header alone.

The KV cache is counted for ordinary attention layers in 16-bit floats; layers without attention count nothing and
compute buffers are an upper estimate. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguforge.quant.errors import EngineError, GGUFError
from gguforge.quant.metadata import Value
from gguforge.quant.reader import GGUFFile

DEFAULT_CONTEXT = 8192
SMALLEST_CONTEXT = 512
_CONTEXT_STEP = 256  # llama.cpp rounds a context up to this
_BATCH = 512
_SPARE = 64 << 20  # the process itself and the allocator


@dataclass(frozen=True)
class Needs:
    """Bytes that running a model takes.

    Attributes:
        weights: all tensors.
        kv_per_token: the KV cache for one token of context.
        compute: buffers for one batch.
    """

    weights: int
    kv_per_token: int
    compute: int

    def total(self, context: int) -> int:
        """Bytes in all for a context of so many tokens."""
        return self.weights + self.kv_per_token * context + self.compute + _SPARE


def needs(file: GGUFFile) -> Needs:
    """What a file needs, from its metadata and tensor headers.

    Raises:
        GGUFError: the metadata that says so is of the wrong kind.
    """
    weights = sum(tensor.nbytes for tensor in file.tensors)
    widest = max((tensor.shape[0] for tensor in file.tensors), default=0)  # the vocabulary, as a rule
    embedding = _number(file.metadata, "embedding_length", 0)
    compute = 4 * _BATCH * (widest + 8 * embedding)
    return Needs(weights, kv_bytes_per_token(file.metadata), compute)


def kv_bytes_per_token(metadata: Mapping[str, Value]) -> int:
    """16-bit keys and values of one token over all layers.

    Example: 16 layers of 8 key/value heads of 64 elements -> 16 * 8 * (64 + 64) * 2 = 32768.
    """
    layers = _number(metadata, "block_count", 0)
    heads = _numbers(metadata, "attention.head_count", layers)
    kv_heads = _numbers(metadata, "attention.head_count_kv", layers) or heads
    if not heads or not max(heads):
        return 0
    head_size = _number(metadata, "embedding_length", 0) // max(heads)
    key = _number(metadata, "attention.key_length", head_size)
    value = _number(metadata, "attention.value_length", head_size)
    return sum(kv_heads) * (key + value) * 2


def positions(file: GGUFFile) -> int | None:
    """Rows of a learned table of positions, beyond which llama.cpp ends the process; None for a model without one."""
    return next((tensor.shape[0] for tensor in file.tensors if tensor.name == "position_embd.weight"), None)


def choose_context(file: GGUFFile, asked: int | None, memory: int | None) -> int:
    """Tokens of context: what was asked for, or the training length, at most 8192, as far as memory allows.

    Args:
        asked: the user's wish, None for none.
        memory: bytes available, None when unknown.

    Raises:
        EngineError: the model, or the context that was asked for, does not fit.
    """
    most = positions(file)
    if asked and most and asked > most:
        raise EngineError(
            "the context is longer than the model's table of positions", path=file.path,
            expected=f"at most {most} tokens", found=asked, remedy="Choose a shorter context (--context).",
        )  # fmt: skip
    need = needs(file)
    room = None if memory is None else memory - need.total(0)
    fits = None if room is None or not need.kv_per_token else room // need.kv_per_token // _CONTEXT_STEP * _CONTEXT_STEP
    trained = _number(file.metadata, "context_length", DEFAULT_CONTEXT) or DEFAULT_CONTEXT
    wanted = asked or min(trained, DEFAULT_CONTEXT)
    if memory is not None and need.total(min(wanted, SMALLEST_CONTEXT)) > memory:
        raise _too_big(file, need.total(min(wanted, SMALLEST_CONTEXT)), memory, "Use a smaller type such as Q4_K_M.")
    if fits is None or wanted <= fits:
        return wanted
    if asked:
        remedy = f"The largest context that fits is {fits}." if fits else "Use a smaller type such as Q4_K_M."
        raise _too_big(file, need.total(asked), memory, remedy)
    return max(fits, min(wanted, SMALLEST_CONTEXT))


def _too_big(file: GGUFFile, need: int, memory: int | None, remedy: str) -> EngineError:
    assert memory is not None
    return EngineError(
        "not enough memory", path=file.path, expected=f"{need / 1e9:.2f} GB", found=f"{memory / 1e9:.2f} GB available",
        remedy=remedy,
    )  # fmt: skip


def _entry(metadata: Mapping[str, Value], name: str) -> object:
    architecture = metadata.get("general.architecture")
    entry = metadata.get(f"{architecture.value}.{name}") if architecture else None
    return None if entry is None else entry.value


def _number(metadata: Mapping[str, Value], name: str, default: int) -> int:
    found = _entry(metadata, name)
    if found is None:
        return default
    if isinstance(found, list) and found and all(type(item) is int for item in found):
        found = max(item for item in found if isinstance(item, int))
    if type(found) is not int or not 0 <= found < 2**32:
        raise GGUFError(f"metadata key {name} is not a sensible whole number", found=repr(found)[:60])
    return found


def _numbers(metadata: Mapping[str, Value], name: str, layers: int) -> list[int]:
    """A value for each layer: the key holds a list, or one number for all."""
    found = _entry(metadata, name)
    if isinstance(found, list):
        return [item for item in found if type(item) is int and 0 <= item < 2**32]
    return [_number(metadata, name, 0)] * min(layers, 1 << 16) if found is not None else []
