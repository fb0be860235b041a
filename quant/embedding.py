"""How errors of the token embedding show: through the matrices of the first block, which read it.

A row of the embedding is normalized, multiplied by the norm's weights g column by column, and then by the matrices W of
the first attention. An error e of the row changes their outputs by W G e, so what counts is e^T (sum G W^T W G) e: many
directions of a row hardly show at all, and encoding with feedback moves the errors there. Needs no text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gguforge.quant.plan import Plan, TensorPlan

EMBEDDING, NORM = "token_embd.weight", "blk.0.attn_norm.weight"
READERS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_kv_a_mqa")

OTHERS = 0.3
"""Weight of all directions alike, for what else reads the embedding: later blocks, and the head where it is tied."""


def embedding_moments(plan: Plan) -> NDArray[np.float32] | None:
    """What takes the place of the inputs' moments when the embedding is encoded with feedback.

    Args:
        plan: a model whose sources are not quantized.

    Returns:
        shape (width, width), mean of the diagonal 1 + OTHERS; None where nothing in the plan reads the embedding in
        that way.
    """
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    norm = tensors.get(NORM)
    readers = [tensors[name] for kind in READERS if (name := f"blk.0.{kind}.weight") in tensors]
    readers = [tensor for tensor in readers if norm is not None and tensor.row_length == norm.elements]
    if norm is None or not readers:
        return None
    gains = norm.source.rows(0, 1)[0]
    seen = sum((_visible(tensor, gains) for tensor in readers), np.zeros((len(gains),) * 2, np.float32))
    scale = float(seen.diagonal().mean())
    if not np.isfinite(scale) or scale <= 0:
        return None
    return seen / np.float32(scale) + np.float32(OTHERS) * np.eye(len(seen), dtype=np.float32)


def _visible(tensor: TensorPlan, gains: NDArray[np.float32]) -> NDArray[np.float32]:
    """G W^T W G, its trace 1 (0 for a matrix of zeros)."""
    matrix = tensor.source.rows(0, tensor.rows) * gains
    found: NDArray[np.float32] = matrix.T @ matrix
    trace = float(np.trace(found))
    return found / np.float32(trace or 1.0)
