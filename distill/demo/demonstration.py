"""The whole path on the model that ships inside: convert it, quantize it, and let each version answer one question.

Nothing is printed here; the command `gguforge demo` shows what this yields.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguforge.convert import convert
from gguforge.quant.plan import Plan
from gguforge.quant.quantize import quantize
from gguforge.runtime.chat import answer_once
from gguforge.runtime.sampling import GREEDY

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo_model"
"""The checkpoint that ships inside, in Hugging Face format."""

QUESTION = "What is gguforge?"
"""What each version is asked unless something else is wanted; every one of them knows it."""

CHATTING = "Q4_K_M"
"""The version that the demo chats with."""


@dataclass(frozen=True)
class Version:
    """One of the files, and what it says.

    Attributes:
        type: the type it was converted or quantized to.
        nbytes: size of the file.
        bits_per_weight: of the tensors.
        seconds: that converting or quantizing took.
        answer: to the demo's question, by greedy decoding.
    """

    type: str
    path: Path
    nbytes: int
    bits_per_weight: float
    seconds: float
    answer: str


def versions(
    folder: Path, question: str = QUESTION, *, checkpoint: Path = CHECKPOINT, overwrite: bool = False
) -> Iterator[Version]:
    """Make the BF16, Q4_K_M and Q2_K files in `folder` and yield each as soon as it has answered.

    Raises:
        GGUForgeError: as `convert`, `quantize` and `answer_once`.
    """
    full = folder / "gguforge-demo-BF16.gguf"
    start = time.perf_counter()
    plan = convert(checkpoint, full, type="BF16", model_name="gguforge demo", workers=1, overwrite=overwrite)
    yield _answered("BF16", full, plan, time.perf_counter() - start, question)
    for preset in (CHATTING, "Q2_K"):
        path = folder / f"gguforge-demo-{preset}.gguf"
        start = time.perf_counter()
        plan = quantize(full, path, preset, workers=1, overwrite=overwrite)
        yield _answered(preset, path, plan, time.perf_counter() - start, question)


def copy_checkpoint(folder: Path) -> Path:
    """Lay the checkpoint into `folder/checkpoint`, to try `gguforge convert` on."""
    return Path(shutil.copytree(CHECKPOINT, folder / "checkpoint", dirs_exist_ok=True))


def _answered(type: str, path: Path, plan: Plan, seconds: float, question: str) -> Version:
    answer = answer_once(path, question, sampling=GREEDY)
    return Version(type, path, path.stat().st_size, plan.bits_per_weight, seconds, answer)
