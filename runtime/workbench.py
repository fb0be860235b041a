"""The folder in which a model is tuned: encoded tensors, hidden states, block files; a stopped run goes on from there.

Every file appears whole. A progress file names the work, so what another work left is not used. The folder is no part
of the result: when the model is written, it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from gguforge.quant.blocks.base import Bytes
from gguforge.quant.errors import OutputError
from gguforge.quant.plan import TensorPlan
from gguforge.quant.quality import EncodedSource
from gguforge.quant.sources import FileSource
from gguforge.runtime.blocks import States

PROGRESS = "progress.json"
SIDES = ("exact", "present")


class Workbench:
    """A tuning folder.

    Attributes:
        path: the folder.
        blocks_done: how many blocks are finished.

    Args:
        path: the folder; made, or taken over if a run of the same work left it.
        work: names the work.

    Raises:
        OutputError: something that is no tuning folder has its name.
    """

    def __init__(self, path: Path, work: str) -> None:
        self.path, self._work, self.blocks_done = path, work, 0
        found = self._read()
        if path.exists() and found is None and (not path.is_dir() or any(path.iterdir())):
            raise OutputError("this is in the way", path=path, remedy="Move it away, or choose another output.")
        if found is not None and found["work"] == work:
            self.blocks_done = int(found["blocks_done"])
            return
        self.remove()
        path.mkdir(parents=True)
        self._write()

    def _read(self) -> dict[str, str | int] | None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads((self.path / PROGRESS).read_text())
            return {"work": str(found["work"]), "blocks_done": int(found["blocks_done"])}
        return None

    def _write(self) -> None:
        text = json.dumps({"work": self._work, "blocks_done": self.blocks_done})
        part = self.path / "progress.part"
        part.write_text(text)
        os.replace(part, self.path / PROGRESS)

    def finish_block(self) -> None:
        """Write down that one more block is done; its inputs are not needed any more."""
        self.blocks_done += 1
        self._write()
        for side in SIDES:
            self._states_path(self.blocks_done - 1, side).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def _encoded_path(self, index: int) -> Path:
        return self.path / f"{index}.blocks"

    def save(self, index: int, data: Bytes) -> None:
        """Keep the encoded form of tensor number `index`."""
        part = self.path / "blocks.part"
        data.tofile(part)
        os.replace(part, self._encoded_path(index))

    def encoded(self, index: int, tensor: TensorPlan) -> TensorPlan | None:
        """The tensor from what was kept, None if it is not encoded yet."""
        path = self._encoded_path(index)
        if not path.exists():
            return None
        source = EncodedSource(tensor.source, FileSource(str(path), 0, tensor.shape, tensor.type))
        return replace(tensor, source=source, importance=None)

    def _states_path(self, number: int, side: str) -> Path:
        return self.path / f"{side}-{number}.npy"

    def states(self, number: int, side: str) -> States:
        """The hidden states that go into a block, shape (chunks, tokens, width), mapped."""
        found: States = np.load(self._states_path(number, side), mmap_mode="r")
        return found

    def new_states(self, number: int, side: str, shape: tuple[int, ...]) -> tuple[Path, States]:
        """States to be filled in, in a file of another name: see `keep_states`."""
        part = self.path / f"{side}.part"
        return part, np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)

    def keep_states(self, part: Path, number: int, side: str) -> None:
        """The states are whole."""
        os.replace(part, self._states_path(number, side))
