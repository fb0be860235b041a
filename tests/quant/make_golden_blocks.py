"""Makes golden_blocks.json: one block of each type, in hex, as ggml writes it.

Run on x86-64 with llama-cpp-python installed: `python tests/quant/make_golden_blocks.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import ggml
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T

from gguforge.quant.blocks import REGISTRY


def main() -> None:
    """Write the file beside this script."""
    x = (np.random.default_rng(7).standard_normal(256) * 0.05).astype(np.float32)
    blocks = {}
    for type in sorted(REGISTRY):
        if type == T.F32:
            continue
        size, nbytes = GGML_QUANT_SIZES[type]
        row = x[None, : max(32, size)]
        blocks[type.name] = ggml.encode(row, type, row.size // size * nbytes).tobytes().hex()
    golden = {"input": [f"{bits:08x}" for bits in x.view(np.uint32)], "blocks": blocks}
    (Path(__file__).parent / "golden_blocks.json").write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
