"""Rows and importance matrices of every kind that a checkpoint can hold, the same each time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

ROW = 1024


def rows(kind: str, n: int = 48) -> np.ndarray:
    """Rows of one kind, shape (n, 1024), the same each time."""
    rng = np.random.default_rng(20260101)
    normal = (rng.standard_normal((n, ROW)) * 0.02).astype(np.float32)
    match kind:
        case "gaussian":
            return normal
        case "heavy-tailed":
            return (rng.standard_t(2, (n, ROW)) * 0.02).astype(np.float32)
        case "bf16-rounded":
            return (normal.view(np.uint32) & 0xFFFF0000).view(np.float32)
        case "f16-rounded":
            return normal.astype(np.float16).astype(np.float32)
        case "constant":
            return np.repeat(rng.standard_normal((n, 1)).astype(np.float32), ROW, axis=1)
        case "zero":
            return np.zeros((n, ROW), np.float32)
        case "zero groups":
            return (normal.reshape(-1, 16) * (rng.random((n * ROW // 16, 1)) < 0.7)).reshape(n, ROW).astype(np.float32)
        case "denormal":
            return normal * np.float32(1e-38)
        case "tiny":
            return normal * np.float32(1e-12)
        case "mixed scales":
            scale = 10.0 ** rng.integers(-44, 4, (n, ROW // 256))
            return normal * scale.repeat(256, axis=1).astype(np.float32)
        case "positive":
            return np.abs(normal)
        case "negative":
            return -np.abs(normal)
        case "integers":
            return rng.integers(-8, 9, (n, ROW)).astype(np.float32)
        case "sparse":
            return normal * (rng.random((n, ROW)) < 0.05)
        case _:
            raise ValueError(kind)


KINDS = (
    "gaussian", "heavy-tailed", "bf16-rounded", "f16-rounded", "constant", "zero", "zero groups", "denormal", "tiny",
    "mixed scales", "positive", "negative", "integers", "sparse",
)  # fmt: skip


def columns(kind: str) -> np.ndarray:
    """Importance of each column, shape (1024,)."""
    rng = np.random.default_rng(20260202)
    weights = rng.standard_normal(ROW) ** 2
    match kind:
        case "random":
            pass
        case "some zero":
            weights[rng.random(ROW) < 0.2] = 0
            weights[300:316] = 0
            weights[512:768] = 0
        case "some huge":
            weights[rng.random(ROW) < 0.02] *= 1e7
        case "tiny":
            weights *= 1e-12
        case _:
            raise ValueError(kind)
    return weights.astype(np.float32)


WEIGHTS = ("random", "some zero", "some huge", "tiny")


def digests(encode: Callable[[np.ndarray, np.ndarray | None], np.ndarray], required: bool) -> dict[str, str]:
    """Hashes of what an encoder makes of three rows of each kind, without importance and with each kind of it."""
    found = {}
    for kind in KINDS:
        for importance in (*(() if required else (None,)), *WEIGHTS):
            data = encode(rows(kind, 3), None if importance is None else columns(importance))
            found[f"{kind}, {importance or 'no'} importance"] = hashlib.sha256(data.tobytes()).hexdigest()[:16]
    return found
