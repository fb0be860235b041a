"""One- and two-bit types without a search: Q1_0 (signs), Q2_0 and the ternary TQ1_0 and TQ2_0.

Equal `quantize_row_{q1_0,q2_0,tq1_0,tq2_0}_ref` and their inverses of ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gguforge.quant.blocks.base import Block, Blocks, Bytes, Floats, block_mean, f2, u1
from gguforge.quant.blocks.legacy import reciprocal, round_half_away, settle
from gguforge.quant.blocks.packing import pack_2bit, unpack_2bit
from gguforge.quant.constants import GGMLQuantizationType as T

u8 = np.uint8
POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def trits(x: Floats) -> tuple[Floats, Bytes]:
    """The largest magnitude of each block, and each weight as 0, 1 or 2: that much below, near or above zero."""
    d = np.abs(x).max(axis=1, keepdims=True)
    inverse = reciprocal(d)
    return d, (round_half_away(settle(x * inverse, inverse)) + 1).astype(np.uint8)


class Q1_0(Block, type=T.Q1_0, size=128, d=f2, qs=(u1, 16)):
    """Signs and the mean magnitude: 1.125 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        out["d"] = block_mean(np.abs(x), "block").astype(np.float16)
        out["qs"] = np.packbits(x >= 0, axis=1, bitorder="little")

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        d = b["d"].astype(np.float32)[:, None]
        return np.where(np.unpackbits(b["qs"], axis=1, bitorder="little") > 0, d, -d)


class Q2_0(Block, type=T["Q2_0"], size=64, d=f2, qs=(u1, 16)):
    """Levels -1, 0, 1 (and 2, which the encoder never writes) times the largest magnitude: 2.25 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        d, levels = trits(x)
        levels[~np.isfinite(reciprocal(d[:, 0]))] = 0  # C turns what is no integer into the smallest one
        out["d"] = d[:, 0].astype(np.float16)
        q = levels.reshape(-1, 16, 4)
        out["qs"] = q[..., 0] | q[..., 1] << u8(2) | q[..., 2] << u8(4) | q[..., 3] << u8(6)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        q = (b["qs"][..., None] >> np.array([0, 2, 4, 6], np.uint8) & u8(3)).astype(np.int8) - 1
        return q.reshape(-1, 64) * b["d"].astype(np.float32)[:, None]


def pack_trits(q: Bytes) -> Bytes:
    """Trits, shape (n, up to 5, m), as base-3 fractions of 256, the first trit on top: shape (n, m)."""
    number = np.zeros((len(q), q.shape[2]), np.uint16)
    for i in range(5):
        number *= 3
        if i < q.shape[1]:
            number += q[:, i]
    return ((number * 256 + 242) // 243).astype(np.uint8)


def unpack_trits(packed: Bytes, count: int) -> Bytes:
    """The inverse of `pack_trits`, shape (n, count * m)."""
    q = (packed[:, None] * POWERS[:count, None]).astype(np.uint16)  # wraps: trits already read drop out at the top
    return (q * 3 >> 8).astype(np.uint8).reshape(len(packed), -1)


class TQ1_0(Block, type=T.TQ1_0, size=256, qs=(u1, 48), qh=(u1, 4), d=f2):
    """Levels -1, 0, 1 times the largest magnitude, five to a byte: 1.6875 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        d, q = trits(x)
        out["d"] = d[:, 0].astype(np.float16)
        out["qs"][:, :32] = pack_trits(q[:, :160].reshape(-1, 5, 32))
        out["qs"][:, 32:] = pack_trits(q[:, 160:240].reshape(-1, 5, 16))
        out["qh"] = pack_trits(q[:, 240:].reshape(-1, 4, 4))

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        parts = unpack_trits(b["qs"][:, :32], 5), unpack_trits(b["qs"][:, 32:], 5), unpack_trits(b["qh"], 4)
        return (np.concatenate(parts, axis=1).astype(np.int8) - 1) * b["d"].astype(np.float32)[:, None]


class TQ2_0(Block, type=T.TQ2_0, size=256, qs=(u1, 64), d=f2):
    """Levels -1, 0, 1 (and 2, which the encoder never writes) times the largest magnitude: 2.0625 bpw."""

    @staticmethod
    def encode_blocks(x: Floats, w: Floats | None, out: Blocks) -> None:
        d, q = trits(x)
        out["d"], out["qs"] = d[:, 0].astype(np.float16), pack_2bit(q)

    @staticmethod
    def decode_blocks(b: Blocks) -> Any:
        return (unpack_2bit(b["qs"]).astype(np.int8) - 1) * b["d"].astype(np.float32)[:, None]
