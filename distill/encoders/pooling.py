"""How an encoder's states become a text's embedding, as the files of sentence-transformers say it.

`modules.json` lists what a text passes: the transformer, the pooling, whose config.json says which one, and perhaps a
normalization. Embeddings are compared by their cosine, so that here they always have length 1.
Format: https://www.sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gguforge.convert.architectures import pooling
from gguforge.convert.checkpoint import Checkpoint
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FOLDERS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
"""What an embedding passes here, and the folders of those modules."""


class Pooling(enum.Enum):
    """Which states make the embedding: the mean of all that are no padding, or the first one."""

    MEAN = pooling.MEAN
    CLS = pooling.CLS


def pooled(states: Tensor, attention: Tensor, kind: Pooling) -> Tensor:
    """Embeddings of length 1, shape (batch, width).

    Args:
        states: of the last layer, shape (batch, length, width).
        attention: what is no padding, shape (batch, length), bool.
    """
    from torch.nn.functional import normalize

    if kind is Pooling.CLS:
        return normalize(states[:, 0], dim=-1)
    seen = attention[:, :, None].to(states.dtype)
    return normalize((states * seen).sum(1), dim=-1)  # the sum points where the mean does


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a checkpoint; the mean where its files say nothing.

    Raises:
        InputError: it is another one, or more comes behind it than a normalization.
    """
    checkpoint = Checkpoint(folder.absolute(), {}, {})
    modules = checkpoint.list(pooling.MODULES) if checkpoint.has(pooling.MODULES) else []
    for kind in {str(module.get("type")).rpartition(".")[2] for module in modules} - FOLDERS.keys():
        raise InputError("an embedding passes more than a pooling and a normalization", path=folder, found=kind)
    found = pooling.pooling(checkpoint).get("pooling_type")
    if found is None:
        return Pooling.MEAN
    if found.value == pooling.LAST:
        raise InputError("the last token is no embedding of an encoder", path=folder, expected="the mean or the first")
    return Pooling(found.value)


def write_pooling(folder: Path, kind: Pooling, width: int) -> None:
    """Add the files that name a checkpoint's pooling."""
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(FOLDERS.items())
    ]
    flags = {flag: number == kind.value for flag, number in pooling.FLAGS.items()}
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    for path, content in (
        (folder / pooling.MODULES, modules),
        (folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **flags}),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
