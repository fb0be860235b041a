"""The files that one worker reads, kept open, and the memory that it reads them into.

Reading into the same memory again costs less than mapping each slab: nothing is mapped page by page, and what was just
read is still in the cache when it is encoded.
"""

from __future__ import annotations

import os

import numpy as np

from gguforge.quant.errors import InputError
from gguforge.quant.files import read_at
from gguforge.quant.search.base import scratch
from gguforge.quant.sources import Bytes, Source


class Inputs:
    """Open files by path."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def close(self) -> None:
        """Close them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def descriptor(self, path: str) -> int:
        """The open file of that path."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return self._descriptors[path]

    def rows(self, source: Source, start: int, stop: int) -> Bytes:
        """`source.raw_rows(start, stop)`; the next call may overwrite them.

        Raises:
            InputError: a file is shorter than it should be.
        """
        extent = source.extent
        if extent is None:
            return source.raw_rows(start, stop)
        size = source.row_bytes
        rows = scratch("stored", (-(-(stop - start) * size // 4),)).view(np.uint8)[: (stop - start) * size]
        begin = extent.offset + start * size
        found = read_at(self.descriptor(extent.path), begin, rows.data)
        if found < rows.size:
            raise InputError(
                "file is cut short",
                path=extent.path,
                expected=f"at least {begin + rows.size} bytes",
                found=f"{begin + found} bytes",
            )
        return rows.reshape(-1, size)
