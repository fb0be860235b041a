"""Opens a teacher by what the user gave: a GGUF file, a checkpoint's folder, or the address of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguforge.distill.teachers.base import Teacher
from gguforge.quant.errors import InputError


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher is, and how to run it.

    Attributes:
        place: a GGUF file, a checkpoint's folder, or a server's address (see `gguforge.distill.teachers.server`).
        weight: its share of a mixture.
        threads: None for the physical cores.
        device: that torch computes a checkpoint on; None for a GPU where there is one.
        tokenizer: of a server's model: a GGUF file or a checkpoint's folder.
        key_variable: the environment variable that holds a server's key.
    """

    place: str
    weight: float = 1.0
    threads: int | None = None
    device: str | None = None
    tokenizer: str | None = None
    key_variable: str | None = None


def open_teacher(source: TeacherSource, context: int) -> Teacher:
    """Open a teacher for documents of at most `context` tokens.

    Raises:
        GGUForgeError: it is missing, damaged, or does not fit the memory.
    """
    if source.place.startswith(("http://", "https://")):
        from gguforge.distill.teachers.server import ServerTeacher

        return ServerTeacher.open(source.place, tokenizer=source.tokenizer, key_variable=source.key_variable)
    path = Path(source.place)
    if path.is_file():
        from gguforge.distill.teachers.gguf import GGUFTeacher

        return GGUFTeacher.open(path, context=context, threads=source.threads)
    if path.is_dir():
        from gguforge.distill.teachers.checkpoint import CheckpointTeacher

        return CheckpointTeacher.open(path, context=context, threads=source.threads, device=source.device)
    raise InputError("no such teacher", path=source.place, expected="a GGUF file, a checkpoint's folder or an address")
