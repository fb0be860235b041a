"""Named NumPy arrays in a safetensors file that appears whole, with a hash of its data in its own header.

The same arrays and remarks give the same bytes: arrays lie in the order of falling item size (so each is aligned), then
by name. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.convert.safetensors import read_metadata, read_safetensors
from gguforge.quant.errors import CheckpointError, InputError
from gguforge.quant.files import replacing
from gguforge.quant.sources import map_window

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HASH = "sha256"  # of all bytes behind the header

Array = NDArray[Any]


def write_arrays(
    path: Path, arrays: Mapping[str, Array], remarks: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write arrays of the types in `DTYPES`, and remarks, which go into the header.

    Raises:
        OutputError: the file exists, or does not fit on the disk.
    """
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    digest, place = hashlib.sha256(), 0
    entries: dict[str, Any] = {}
    parts = []
    for name, array in ordered:
        dtype = array.dtype.newbyteorder("<")
        data = array.astype(dtype).tobytes()
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [place, place + len(data)]}
        place += len(data)
        parts.append(data)
        digest.update(data)
    header = {"__metadata__": {**remarks, _HASH: digest.hexdigest()}, **entries}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, 8 + len(text) + place, overwrite) as temporary, temporary.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in parts:
            file.write(data)


def read_arrays(path: Path) -> dict[str, Array]:
    """Read-only memory maps of a file's arrays.

    Raises:
        InputError: the file is damaged or holds other types.
        OSError: it cannot be opened.
    """
    arrays = {}
    try:
        for name, entry in read_safetensors(path).items():
            if entry.dtype not in DTYPES:
                raise InputError("array is of no type that targets have", path=path, tensor=name, found=entry.dtype)
            window = map_window(str(path), entry.offset, entry.nbytes)
            arrays[name] = window.view(DTYPES[entry.dtype]).reshape(entry.shape)
    except CheckpointError as error:
        raise _damaged(path, error) from None
    return arrays


def read_remarks(path: Path) -> dict[str, str]:
    """The remarks that were written with the arrays; errors as `read_arrays`."""
    try:
        return {name: text for name, text in read_metadata(path).items() if name != _HASH}
    except CheckpointError as error:
        raise _damaged(path, error) from None


def check_arrays(path: Path) -> None:
    """Hash the data and compare with what the header says.

    Raises:
        InputError: they differ, or the file is damaged.
    """
    try:
        wanted = read_metadata(path).get(_HASH)
        start = min((entry.offset for entry in read_safetensors(path).values()), default=path.stat().st_size)
    except CheckpointError as error:
        raise _damaged(path, error) from None
    with path.open("rb") as file:
        file.seek(start)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise _damaged(path, InputError("data does not have the hash in its header", expected=wanted, found=found))


def _damaged(path: Path, error: InputError) -> InputError:
    return InputError(
        error.what, path=path, tensor=error.tensor, expected=error.expected, found=error.found,
        remedy="The file is damaged: delete it and collect it again.",
    )  # fmt: skip
