"""How the embeddings of a text's tokens become one: what a sentence-transformers folder says about it."""

from __future__ import annotations

from gguforge.convert.checkpoint import Checkpoint
from gguforge.quant.errors import CheckpointError
from gguforge.quant.metadata import Value, uint32

MODULES = "modules.json"
MEAN, CLS, LAST = 1, 2, 3
FLAGS = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_cls_token": CLS, "pooling_mode_lasttoken": LAST}
NAMES = {"mean": MEAN, "cls": CLS, "lasttoken": LAST}
"""llama.cpp's `llama_pooling_type` by the words of older and newer folders."""


def pooling(checkpoint: Checkpoint) -> dict[str, Value]:
    """`pooling_type` as the Pooling module of modules.json sets it; {} if there is none.

    Raises:
        CheckpointError: the module's config is missing or damaged, or llama.cpp has no such pooling.
    """
    if not checkpoint.has(MODULES):
        return {}
    module = next((module for module in checkpoint.list(MODULES) if str(module.get("type")).endswith("Pooling")), None)
    if module is None:
        return {}
    name = f"{module.get('path') or ''}/config.json".lstrip("/")
    if not checkpoint.has(name):
        remedy = f"Download the folder that {MODULES} names, too."
        raise CheckpointError("the pooling module's config is missing", path=checkpoint.folder / name, remedy=remedy)
    config = checkpoint.object(name)
    kind = next((kind for flag, kind in FLAGS.items() if config.get(flag)), None)
    mode = config.get("pooling_mode")
    kind = NAMES.get(mode) if kind is None and isinstance(mode, str) else kind
    if kind is None:
        found = ", ".join(key for key, value in config.items() if value is True) or str(mode)
        sides = {"expected": "mean, cls or last token", "found": found[:80]}
        raise CheckpointError("llama.cpp has no such pooling", path=checkpoint.folder / name, **sides)
    return {"pooling_type": uint32(kind)}
