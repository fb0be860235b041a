"""Executes a plan: several workers fill the tensors in at their known offsets, slab by slab.

The header is written last: a file cut at any moment is no GGUF file. What a stopped run had done is used by the next.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguforge.quant.blocks import block_type
from gguforge.quant.cache import Cache
from gguforge.quant.errors import OutputError
from gguforge.quant.files import part_of, resumable, write_at
from gguforge.quant.following import Follower, Say, fingerprint
from gguforge.quant.plan import Plan, dimensions_on_disk
from gguforge.quant.reader import read_gguf
from gguforge.quant.relative_error import relative_errors
from gguforge.quant.slabs import ENCODE_SLAB, Filled, Filler, end, naming, unfinished
from gguforge.quant.workers import Team, processors

BASE_MEMORY = 60 << 20  # bytes of an idle process with NumPy loaded
SLAB_MEMORY = 24 << 20  # bytes a worker needs beyond that, for one slab of ordinary rows

Progress = Callable[[int], None]
log = logging.getLogger("gguforge.quant")


def default_workers(plan: Plan) -> int:
    """All processors for a plan that encodes; two for a plan that mostly copies, which the disk alone holds up."""
    return processors() if encodes(plan) else min(2, processors())


def encodes(plan: Plan) -> bool:
    """Whether a plan is more than a copy: more than an eighth of its elements changes its type."""
    made = (t for t in plan.tensors if not t.is_copy or t.source.extent is None or t.source.stored is not t.source)
    encoded = (t.elements for t in made)
    return 8 * sum(encoded) > plan.elements


def peak_memory(plan: Plan, workers: int | None = None) -> int:
    """Upper estimate, in bytes, of the resident memory of all processes while the plan is executed."""
    workers = workers or default_workers(plan)
    longest = max((tensor.row_length for tensor in plan.tensors), default=0)
    return workers * (BASE_MEMORY + SLAB_MEMORY * max(1, longest // ENCODE_SLAB)) + 2 * len(plan.header)


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        tensors: SHA-256 of each tensor's bytes, hexadecimal, in file order; empty where nothing was hashed.
        digest: SHA-256 over that of the header and those of the tensors (their 32 bytes each, one after the other);
            empty likewise.
        errors: relative error of each tensor, see `gguforge.quant.relative_error`; empty likewise.
        encoded: number of tensors that were encoded in this run, wholly or in part.
        cached: number of tensors that came from the cache instead.
    """

    tensors: tuple[str, ...]
    digest: str
    errors: tuple[float | None, ...]
    encoded: int
    cached: int


def write(
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say = log.info,
    cache: Cache | None = None,
    hashed: bool | None = None,
) -> Written:
    """Execute a plan; if an earlier run of the same plan was stopped, go on from there.

    Args:
        plan: what to write.
        output: the file; appears only when it is complete, synced and re-read.
        workers: processes to use; by default what `default_workers` finds suitable.
        overwrite: replace an existing file.
        progress: called with the number of output bytes that were finished since the last call.
        say: receives a line when work of an earlier run is used, or cannot be.
        cache: where encoded rows are looked up and kept.
        hashed: hash what is written, so that a stopped run can be resumed; None for plans that encode. A mere copy is
            sooner made again than hashed.

    Raises:
        OutputError: the file cannot be written.
        InputError: an input is cut short or its type is not supported.
        DataError: a tensor holds NaN or infinity, or values too large for its type.
        BaseException: where the run was stopped after some seconds of work, what was done is kept, and a note added to
            the exception says so.
    """
    (written,) = write_all(
        [(Path(output), plan)],
        workers=workers,
        overwrite=overwrite,
        progress=progress,
        say=say,
        cache=cache,
        hashed=hashed,
    )
    return written


def write_all(
    files: Sequence[tuple[Path, Plan]],
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say = log.info,
    cache: Cache | None = None,
    hashed: bool | None = None,
) -> list[Written]:
    """Execute the plans of one model's files, which appear only when all are complete; the first one appears last.

    Whatever happens on the way, a first file stands only beside the files that belong to it: where an older model of
    the same name is replaced, its first file goes before any other is renamed.

    Args:
        files: each file with its plan, in order.
        workers, overwrite, progress, say, cache, hashed: see `write`.

    Raises:
        GGUForgeError: see `write`.
    """
    check_inputs(files)
    if cache is not None:
        cache.open()
    idle = not (any(encodes(plan) for _, plan in files) if hashed is None else hashed)
    names = ["" if idle else fingerprint(plan) for _, plan in files]
    with ExitStack() as renaming:  # unwinds from the last file to the first
        parts = [
            renaming.enter_context(resumable(path, plan.size, name, overwrite))
            for (path, plan), name in zip(files, names, strict=True)
        ]
        written = []
        for part, name, (_, plan) in zip(parts, names, files, strict=True):
            follower = Follower(plan, part, idle)
            follower.resume(name, say, progress or (lambda _: None))
            written.append(_execute(plan, follower, workers, progress or (lambda _: None), cache))
            if len(files) > 1:
                follower.record()  # the next file may take long
        if len(files) > 1:
            Path(os.path.realpath(files[0][0])).unlink(missing_ok=True)
    return written


def _execute(plan: Plan, follower: Follower, workers: int | None, progress: Progress, cache: Cache | None) -> Written:
    """Fill a part file, sync it, and read it back."""
    part, begin = follower.part.path, follower.hashes.position
    if follower.part.records:
        _write_header(part, bytes(len(plan.header)))  # a run that was stopped at the very end left one
    work = unfinished(plan, begin, cache is not None)
    follower.expect([end(plan, slab) for slab in work])
    tally = _Tally(cache)

    def done(number: int, filled: Filled) -> None:
        tally.add(work[number].index, filled)
        progress(filled.nbytes)
        follower.finished(number)

    count = min(workers or default_workers(plan), max(1, len(work) // 4))
    with Team(partial(Filler, plan, part, begin, cache), len(work), count) as team, follower:
        team.run(done)
    if cache is not None:
        cache.trim()
    _write_header(part, plan.header)
    verify(plan, part)
    hashes = tuple(map(bytes.hex, follower.hashes.tensors))
    digest = "" if follower.idle else follower.hashes.digest()
    errors = () if follower.idle else relative_errors(plan, part)
    return Written(hashes, digest, errors, len(tally.encoded), len(tally.cached - tally.encoded))


class _Tally:
    """Which tensors were encoded and which came from the cache, and how much that has grown."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache, self.stored = cache, 0
        self.encoded: set[int] = set()
        self.cached: set[int] = set()

    def add(self, tensor: int, filled: Filled) -> None:
        if filled.cached:
            self.cached.add(tensor)
        elif filled.cached is not None:
            self.encoded.add(tensor)
            self.stored += filled.nbytes
        if self.cache is not None and self.stored > self.cache.limit // 10:
            self.cache.trim()
            self.stored = 0


def _write_header(part: Path, header: bytes) -> None:
    descriptor = os.open(part, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        write_at(descriptor, 0, header)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_inputs(files: Sequence[tuple[Path, Plan]]) -> None:
    """Refuse plans that read what they overwrite (part files included), or whose types have no encoder."""
    tensors = [tensor for _, plan in files for tensor in plan.tensors]
    for tensor in tensors:
        if not tensor.is_copy:
            with naming(tensor):
                block_type(tensor.type), block_type(tensor.source.type)
    sources = {path for tensor in tensors for path in tensor.source.paths}
    for output, _ in files:
        target = Path(os.path.realpath(output))
        overwritten = [path for path in (target, part_of(target)) if path.exists()]
        if any(os.path.samefile(path, one) for path in sources for one in overwritten):
            raise OutputError("output and input are the same file", path=output, remedy="Choose another name with -o.")


def verify(plan: Plan, path: Path) -> None:
    """Read the written file back with the strict reader and compare it with the plan."""
    found = read_gguf(path)
    layouts = [
        [(tensor.name, dimensions_on_disk(tensor.shape), tensor.type) for tensor in tensors]
        for tensors in (plan.tensors, found.tensors)
    ]
    if layouts[0] != layouts[1] or list(found.metadata) != list(plan.metadata) or found.size != plan.size:
        raise OutputError(
            "the written file is not what was planned", path=path, remedy="Check the disk, and report this."
        )


__all__ = ["Written", "default_workers", "peak_memory", "verify", "write", "write_all"]
