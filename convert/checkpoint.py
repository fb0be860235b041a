"""A Hugging Face checkpoint on disk: its config, its tensors over all shards, and its other files.

Only local folders, only safetensors, never code: no pickle is read and nothing from the folder is imported. Every file
must be a regular one inside the folder (or the same repository's blobs of the Hugging Face cache, whose snapshots are
symbolic links).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguforge.convert.json_file import CONFIG_LIMIT, Json, read_list, read_object, read_text
from gguforge.convert.safetensors import StoredTensor, read_safetensors
from gguforge.quant.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
INDEX_LIMIT = 64 << 20
SHARD_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]+\.safetensors")
NUMBERED_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: absolute path.
        config: config.json.
        tensors: by name, in the order in which llama.cpp's converter visits them: shards sorted by file name, tensors
            sorted by name within a shard.
    """

    folder: Path
    config: Json
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        """The folder's name, or `owner/model` when the folder is a snapshot in the Hugging Face cache."""
        repository = _cache_repository(self.folder)
        if repository is None:
            return self.folder.name
        return "/".join(repository.name.split("--")[1:])

    def has(self, name: str) -> bool:
        """Whether the folder holds such a file."""
        return (self.folder / name).is_file()

    def text(self, name: str) -> str:
        """The text of a file; see `read_text` for the errors."""
        return read_text(inside(self.folder, name))

    def object(self, name: str, limit: int = CONFIG_LIMIT) -> Json:
        """The JSON object in a file, {} if there is no such file; see `read_object` for the errors."""
        return read_object(inside(self.folder, name), limit) if self.has(name) else {}

    def list(self, name: str) -> list[Json]:
        """The objects of the JSON list in a file; see `read_list` for the errors."""
        return read_list(inside(self.folder, name))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config and the headers of its shards.

    Raises:
        CheckpointError: the folder, config.json, or a shard is missing or damaged.
        OSError: a file cannot be opened.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        what = "this is not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(
            what, path=folder, remedy="Give the folder that holds config.json and the *.safetensors files."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "config.json is missing", path=folder, remedy="Give the folder of a Hugging Face checkpoint."
        )
    config = read_object(inside(folder, "config.json"))
    return Checkpoint(folder, config, _read_shards(folder))


def inside(folder: Path, name: str) -> Path:
    """The real path of a file of the folder.

    Raises:
        CheckpointError: it lies elsewhere, through `..` or a symbolic link.
    """
    real, root = (folder / name).resolve(), folder.resolve()
    repository = _cache_repository(folder.absolute()) or _cache_repository(root)
    allowed = [root] if repository is None else [root, (repository / "blobs").resolve()]
    if not any(real.is_relative_to(place) for place in allowed):
        remedy = "Copy the file into the folder."
        raise CheckpointError(
            "file lies outside the checkpoint folder", path=folder / name, found=str(real), remedy=remedy
        )
    return real


def _cache_repository(folder: Path) -> Path | None:
    """`models--owner--model` for `.../models--owner--model/snapshots/<revision>`."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent
    return None


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    weight_map = _read_index(folder)
    names = sorted(set(weight_map.values())) if weight_map else _find_shards(folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        found = f"{len(missing)} of {len(names)} missing"
        raise CheckpointError(f"shard {missing[0]} is missing", path=folder, found=found, remedy="Download it again.")
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_safetensors(inside(folder, name)).values():
            if tensor.name in tensors:
                raise CheckpointError("tensor is in two shards", path=folder / name, tensor=tensor.name)
            if weight_map and weight_map.get(tensor.name) != name:
                sides = {"expected": weight_map.get(tensor.name, "no such tensor"), "found": name}
                raise CheckpointError(
                    "index and shards disagree", path=folder / INDEX_NAME, tensor=tensor.name, **sides
                )
            tensors[tensor.name] = tensor
    absent = next((name for name in weight_map if name not in tensors), None)
    if absent is not None:
        raise CheckpointError(
            "tensor is not in its shard", path=folder / weight_map[absent], tensor=absent, remedy="Download it again."
        )
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Shard name by tensor name; {} for a checkpoint without an index."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_object(inside(folder, INDEX_NAME), INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map is missing", path=path)
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                "shard name is not allowed", path=path, expected="letters, digits, . _ -", found=repr(shard)[:80]
            )
    return weight_map


def _find_shards(folder: Path) -> list[str]:
    """The shards of a checkpoint without an index: model*.safetensors, all of them where they are numbered."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        pickled = next((path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)), None)
        if pickled is not None:
            remedy = "Load it in a sandbox and save it with safe_serialization=True."
            raise CheckpointError("the weights are pickled, not safetensors", path=folder, found=pickled, remedy=remedy)
        raise CheckpointError("no model*.safetensors here", path=folder, remedy="Download the weights too.")
    wanted = set(names)
    for name in names:
        if match := NUMBERED_SHARD.fullmatch(name):
            stem, _, count = match.groups()
            wanted |= {f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, min(int(count), 9999) + 1)}
    return sorted(wanted)
