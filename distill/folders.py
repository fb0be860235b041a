"""Folders that appear whole or not at all."""

from __future__ import annotations

import glob
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gguforge.quant.files import sync_directory


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A part folder beside `folder` to fill; it takes its place when the block ends well, and goes when not.

    What a killed run left of the same name is removed first.

    Raises:
        OSError: what the operating system refuses.
    """
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.part"):  # a killed run left it
        shutil.rmtree(stale)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_directory(folder.parent)
