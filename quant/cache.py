"""A cache of encoded weights, so that a second run which changes one rule encodes again only what that rule changes.

Some rows of a tensor are one entry. Its name is a hash of all that its bytes depend on: the stored rows, both types,
the importance, and the text of the encoders themselves. So an entry is never out of date, whichever model, command or
version asks for it; tensors that are mere copies are not kept. An entry starts with a hash of itself, by which a
damaged one is found and made again. Several workers and several runs may use one folder at once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguforge.quant import blocks, search
from gguforge.quant.errors import OutputError
from gguforge.quant.plan import TensorPlan
from gguforge.quant.sources import Bytes

DIGEST = 32  # bytes of the hash before an entry's data
ABANDONED = 3600  # seconds after which an unfinished entry is nobody's
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by gguforge; it can be deleted at any time.\n"
"""Tells backup programs that this folder need not be kept: https://bford.info/cachedir/"""

_counter = itertools.count()
_ENTRY = re.compile(r"[0-9a-f]{62}")


@dataclass(frozen=True)
class Cache:
    """A folder of entries.

    Attributes:
        folder: where they lie, in 256 folders by the first byte of their name.
        limit: bytes; beyond it the entries that have not been used for longest go.
    """

    folder: Path
    limit: int

    def open(self) -> None:
        """Make the folder, and see that entries can be written.

        Raises:
            OutputError: there is something else in its place.
            OSError: what the operating system refuses.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError("the cache must be a folder", path=self.folder, remedy="Name another one with --cache.")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "CACHEDIR.TAG").write_text(TAG)

    def key(self, tensor: TensorPlan, start: int, stop: int) -> str:
        """The name of the entry for rows `start:stop`, which belong to one matrix."""
        facts = f"{encoders()} {tensor.source.type.name} {tensor.type.name} {tensor.row_length}\n"
        digest = hashlib.sha256(facts.encode())
        if tensor.importance is not None:
            digest.update(np.ascontiguousarray(tensor.importance[start // tensor.rows_per_matrix]).data)
        digest.update(np.ascontiguousarray(tensor.source.raw_rows(start, stop)).data)
        return digest.hexdigest()

    def fetch(self, key: str, nbytes: int) -> Bytes | None:
        """An entry's data; None if it is missing or damaged."""
        path = self._path(key)
        try:
            found = path.read_bytes()
        except OSError:
            return None
        if len(found) != DIGEST + nbytes or found[:DIGEST] != _digest(key, memoryview(found)[DIGEST:]):
            return None
        with suppress(OSError):
            os.utime(path)  # it was used
        return np.frombuffer(found, np.uint8, nbytes, DIGEST)

    def store(self, key: str, data: Bytes) -> None:
        """Add an entry; where that fails, on a full disk say, only time is lost."""
        path = self._path(key)
        unfinished = path.with_name(f"{os.getpid()}-{next(_counter)}.tmp")
        view = np.ascontiguousarray(data).data.cast("B")
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            try:
                with unfinished.open("xb") as file:
                    file.write(_digest(key, view))
                    file.write(view)
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise

    def trim(self) -> None:
        """Remove the entries that have not been used for longest, until they fit the limit with a tenth to spare."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        for _, size, path in entries:
            if total <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every entry; what was left unfinished goes."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if _ENTRY.fullmatch(path.name):
                        yield status.st_mtime, status.st_size, path
                    elif path.suffix == ".tmp" and status.st_mtime < time.time() - ABANDONED:
                        path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]


def _digest(key: str, data: memoryview) -> bytes:
    digest = hashlib.sha256(bytes.fromhex(key))
    digest.update(data)
    return digest.digest()


@functools.cache
def encoders() -> str:
    """A hash of the text of all encoders: another version of them makes other entries."""
    digest = hashlib.sha256()
    for package in (blocks, search):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
