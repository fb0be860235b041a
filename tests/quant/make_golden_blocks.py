"""Makes golden_blocks.json: one block of each type, in hex, as ggml writes it with and without importance.

Run on x86-64 with llama-cpp-python installed: `python tests/quant/make_golden_blocks.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import ggml
import numpy as np
from block_rows import digests

from gguforge.quant.blocks import REGISTRY
from gguforge.quant.constants import GGML_QUANT_SIZES
from gguforge.quant.constants import GGMLQuantizationType as T


def main() -> None:
    """Write the file beside this script."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal(256) * 0.05).astype(np.float32)
    importance = (rng.standard_normal(256) ** 2).astype(np.float32)
    blocks, weighted = {}, {}
    for type in sorted(REGISTRY):
        if type == T.F32:
            continue
        size, nbytes = GGML_QUANT_SIZES[type]
        row, weights = x[None, : max(32, size)], importance[: max(32, size)]
        if not REGISTRY[type].required:
            blocks[type.name] = ggml.encode(row, type, row.size // size * nbytes).tobytes().hex()
        if REGISTRY[type].importance != "ignored":
            weighted[type.name] = ggml.encode(row, type, row.size // size * nbytes, weights).tobytes().hex()
    golden = {
        "input": [f"{bits:08x}" for bits in x.view(np.uint32)],
        "importance": [f"{bits:08x}" for bits in importance.view(np.uint32)],
        "blocks": blocks,
        "weighted": weighted,
        "digests": {
            type.name: digests(
                lambda x, w, type=type: ggml.encode(x, type, x.size // 256 * GGML_QUANT_SIZES[type][1], w),
                REGISTRY[type].required,
            )
            for type in (T.IQ1_S, T.IQ1_M, T.IQ2_S)
        },
    }
    (Path(__file__).parent / "golden_blocks.json").write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
