"""What a model file was made from, how, and how near it came: the same few facts for its receipt and its own metadata.

Metadata keys begin with `gguforge.`. They stand only in files that are not promised to be llama.cpp's byte for byte. Of
a source the files' samples are hashed (`gguforge.quant.receipt`), of texts and matrices the whole content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguforge.quant.metadata import Value, float32, string, uint32

PREFIX = "gguforge."
FILES = {"imatrix": "imatrix", "text": "calibration", "size_text": "selection", "rules": "rules"}
"""Settings that are a file's name and hash, and what they are called in the metadata."""

SAMPLE = 4096  # bytes of the header, and of each tensor, that identify a source


@dataclass(frozen=True)
class Measurement:
    """A model's mean Kullback-Leibler divergence from another, nats a token, and on what it was measured.

    Attributes:
        kld, error: the mean, and its standard error.
        text, text_sha256: the text's name and hash.
        skip, chunks, context: chunks left out and read, and their tokens; the second half of each is scored.
        against, against_sha256: the reference file's name, and the hash of its samples.
        digest: of the measured file's receipt; empty until it is in one.
    """

    kld: float
    error: float
    text: str
    text_sha256: str
    skip: int
    chunks: int
    context: int
    against: str
    against_sha256: str
    digest: str = ""

    def words(self) -> str:
        """The measurement for people.

        >>> Measurement(0.0123, 0.0004, "wiki.txt", "", 0, 30, 512, "m-F16.gguf", "").words()
        'KLD 0.01230 ± 0.00040 from m-F16.gguf on 30 chunks of 512 tokens of wiki.txt'
        """
        size = f"{self.chunks} chunks of {self.context} tokens"
        return f"KLD {self.kld:.5f} ± {self.error:.5f} from {self.against} on {size} of {self.text}"


def identify(path: str | os.PathLike[str], offsets: Iterable[int]) -> dict[str, Any]:
    """A file's size, and a hash of its beginning and of what lies at some offsets (of its tensors)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for offset in sorted({0, *offsets}):
            file.seek(offset)
            digest.update(file.read(SAMPLE))
    return {"bytes": os.stat(path).st_size, "sample_sha256": digest.hexdigest()}


def named_hash(path: str | os.PathLike[str]) -> dict[str, str]:
    """A file's name without its folder, and the hash of its content."""
    return {"name": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def essentials(
    tool: str,
    settings: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, Any]],
    measured: Measurement | None = None,
) -> dict[str, Value]:
    """The metadata of a file, from what its receipt says.

    Args:
        tool, settings, sources: see `gguforge.quant.receipt.Receipt`.
        measured: what was known of it before it was written.
    """
    content = json.dumps(sources, sort_keys=True).encode()
    found = {
        "tool": string(tool),
        "quality": string(str(settings.get("quality", "exact"))),
        "source.name": string(", ".join(sorted(sources))),
        "source.sha256": string(hashlib.sha256(content).hexdigest()),
    }
    for setting, key in FILES.items():
        told = settings.get(setting)
        if isinstance(told, Mapping):
            found |= {f"{key}.name": string(told["name"]), f"{key}.sha256": string(told["sha256"])}
    if measured is not None:
        found |= _divergence(measured)
    return {PREFIX + key: value for key, value in found.items()}


def _divergence(measured: Measurement) -> dict[str, Value]:
    return {
        "kld.mean": float32(measured.kld),
        "kld.error": float32(measured.error),
        "kld.text.name": string(measured.text),
        "kld.text.sha256": string(measured.text_sha256),
        "kld.skip": uint32(measured.skip),
        "kld.chunks": uint32(measured.chunks),
        "kld.context": uint32(measured.context),
        "kld.against.name": string(measured.against),
        "kld.against.sha256": string(measured.against_sha256),
    }
