"""Makes an importance matrix: reads text through a model and adds up how strongly each matrix's inputs are excited.

The same sums as llama-imatrix, from the same chunks. What is done is kept in a file beside the output, whole and usable
at any time, from which a stopped run goes on. Method: llama.cpp, tools/imatrix/README.md.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gguforge.quant.errors import EngineError, InputError, OutputError
from gguforge.quant.files import check_target
from gguforge.quant.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from gguforge.quant.reader import GGUFFile
from gguforge.runtime.chunks import Text, read_text
from gguforge.runtime.collector import OUTPUT_MATRIX, SMALLEST_BATCH, Collector
from gguforge.runtime.forward import BATCH, Forward
from gguforge.runtime.interrupt import deferred_signals

DEFAULT_CHUNK = 512  # tokens, as llama-imatrix
SAVE_SECONDS = 60.0  # a killed run loses no more than this
_SAMPLE = 4096  # bytes of each tensor that identify a model

Progress = Callable[[int, int], None]


def calibrate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    process_output: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """Collect an importance matrix and write it.

    Args:
        model: a GGUF file; the better its type, the better the matrix (F16, BF16, Q8_0).
        text: plain text, or conversations in a .jsonl file.
        output: the file; `.dat` writes llama-imatrix's older format.
        context: tokens of a chunk.
        chunks: how many to read at most.
        process_output: collect for `output.weight` as well.
        resume: go on from what a stopped run left, or from a finished output of fewer chunks.
        overwrite: replace an existing output.
        threads: None for the physical cores.
        progress: called with the chunks that are done and their number.

    Raises:
        GGUForgeError: an input is damaged or too short, the output exists, llama.cpp fails, or what is there to be
            resumed belongs to another run.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came; `partial_path(output)` keeps what was done.
    """
    output = Path(output)
    check_target(output, overwrite or resume)
    if context < SMALLEST_BATCH:
        raise InputError("a chunk is too short", expected=f"at least {SMALLEST_BATCH} tokens", found=context)
    earlier = _earlier(output) if resume else None
    if partial_path(output).exists() and not resume and not overwrite:
        raise OutputError(
            "a stopped run left this file", path=partial_path(output),
            remedy="Pass --resume to go on from it, or --overwrite to begin again.",
        )  # fmt: skip
    collector = Collector(process_output, skip_rest=context <= BATCH)
    with Forward.open(model, chunk=context, outputs=BATCH, threads=threads, callback=collector.callback) as forward:
        read = read_text(forward, text, chunks)
        matrix = ImportanceMatrix({}, (read.name,), 0, context, (read.sha256,), model=model_identity(forward.file))
        if earlier is not None:
            _check_same_run(forward.file, matrix, earlier, process_output, output)
            matrix = earlier
            collector.restore(dict(earlier.entries))
        matrix = _collect(forward, collector, read, matrix, output, progress or (lambda done, total: None))
    write_imatrix(matrix, output, overwrite=overwrite or resume)
    partial_path(output).unlink(missing_ok=True)
    return matrix


def partial_path(output: str | os.PathLike[str]) -> Path:
    """Where a run that is not finished keeps what it has: `imatrix.gguf` -> `imatrix.partial.gguf`."""
    return Path(output).with_suffix(".partial.gguf")


def _collect(
    forward: Forward, collector: Collector, text: Text, matrix: ImportanceMatrix, output: Path, progress: Progress
) -> ImportanceMatrix:
    """Read the chunks that `matrix` does not hold yet; saves now and then, and when it is stopped."""
    total, done = len(text.chunks), matrix.chunk_count

    def state(exact: bool = True) -> ImportanceMatrix:
        passages = matrix.fingerprint | text.fingerprint(forward, done)
        return replace(matrix, entries=collector.entries(exact), chunk_count=done, fingerprint=passages)

    saved = time.monotonic()
    with deferred_signals(forward.interrupt) as signals:
        for chunk in text.chunks[done:]:
            progress(done, total)
            collector.begin()
            for _ in forward.read(chunk, 0, len(chunk)):
                pass
            if signals.came:
                break
            collector.keep()
            done += 1
            if time.monotonic() - saved > SAVE_SECONDS and done < total:
                write_imatrix(state(), partial_path(output), overwrite=True)
                saved = time.monotonic()
        if signals.came and done:
            write_imatrix(state(), partial_path(output), overwrite=True)
        signals.raise_if_came()
    progress(done, total)
    if not collector.entries():
        raise EngineError("has no matrices that calibration knows", path=forward.file.path)
    return state(exact=False)


def _earlier(output: Path) -> ImportanceMatrix | None:
    """What a stopped run left, or else the finished output."""
    for path in (partial_path(output), output):
        if path.exists():
            return read_imatrix(path)
    return None


def _check_same_run(
    file: GGUFFile, now: ImportanceMatrix, earlier: ImportanceMatrix, process_output: bool, output: Path
) -> None:
    collected = OUTPUT_MATRIX in earlier.entries
    missed = not collected and any(tensor.name == OUTPUT_MATRIX for tensor in file.tensors)
    differences = {
        "the text": now.text_hashes != earlier.text_hashes,
        "the model": now.model != earlier.model,
        "the chunk size": now.chunk_size != earlier.chunk_size,
        "--process-output": missed if process_output else collected,
    }
    for what, differs in differences.items():
        if differs:
            raise InputError(
                f"what is there was made differently: {what} is another", path=output,
                remedy="Pass --overwrite instead of --resume, or choose another output.",
            )  # fmt: skip


def model_identity(file: GGUFFile) -> str:
    """SHA-256 over a model's header (of a split model, all headers) and the first bytes of each tensor, hexadecimal."""
    digest = hashlib.sha256()
    for part in file.splits or (file,):
        with open(part.path, "rb") as stream:
            digest.update(stream.read(part.data_offset))
            for tensor in part.tensors:
                stream.seek(tensor.offset)
                digest.update(stream.read(min(_SAMPLE, tensor.nbytes)))
    return digest.hexdigest()
