"""How an encoder's states become a text's embedding, as the files of sentence-transformers say it.

`modules.json` lists what a text passes: the transformer, the pooling, whose config.json says which one, and perhaps a
normalization. Embeddings are compared by their cosine, so that here they always have length 1.
Format: https://www.sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguforge.convert.checkpoint import inside
from gguforge.convert.json_file import Json, objects, read_object, read_text
from gguforge.quant.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MODULES = "modules.json"
FOLDER = "1_Pooling"
TYPE = "sentence_transformers.models."


class Pooling(enum.Enum):
    """Which states make the embedding: the mean of all that are no padding, or the first one."""

    MEAN = "pooling_mode_mean_tokens"
    CLS = "pooling_mode_cls_token"

    @classmethod
    def named(cls, config: dict[str, Any]) -> Pooling | None:
        """The one that a pooling's config.json asks for, in its older or its newer form; None for others."""
        wanted = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
        newer = {"mean": cls.MEAN, "cls": cls.CLS}.get(str(config.get("pooling_mode")))
        return next((kind for kind in cls if wanted == {kind.value}), None if wanted else newer)


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
    path = folder / MODULES
    if not path.is_file():
        return Pooling.MEAN
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in _modules(path)}
    for kind in kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise InputError("an embedding passes more than a pooling and a normalization", path=path, found=kind)
    if "Pooling" not in kinds:
        return Pooling.MEAN
    inner = inside(folder, f"{kinds['Pooling'].get('path') or FOLDER}/config.json")
    found = Pooling.named(read_object(inner))
    if found is None:
        raise InputError("pooling is not known here", path=inner, expected="the mean, or the first token")
    return found


def _modules(path: Path) -> list[Json]:
    try:
        modules = json.loads(read_text(path))
    except (ValueError, RecursionError):
        modules = None
    if not isinstance(modules, list):
        raise InputError("is no list of modules", path=path)
    return objects(modules)


def write_pooling(folder: Path, kind: Pooling, width: int) -> None:
    """Add the files that name a checkpoint's pooling."""
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": TYPE + name}
        for number, (path, name) in enumerate((("", "Transformer"), (FOLDER, "Pooling"), ("2_Normalize", "Normalize")))
    ]
    modes = {mode.value: mode is kind for mode in Pooling}
    (folder / FOLDER).mkdir()
    (folder / "2_Normalize").mkdir()
    (folder / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    content = {"word_embedding_dimension": width, **modes}
    (folder / FOLDER / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
