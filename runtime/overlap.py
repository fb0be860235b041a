"""Finds out whether two texts share passages, from a few numbers kept of one of them.

A text's fingerprint is made of the hashes of its runs of 13 words, of which every 32nd or so is kept, chosen by its
value: two texts that share a passage of some lines keep the same ones, wherever the passage stands and whichever
tokenizer cut it. 13 words are what GPT-3's authors took for evidence of copying (arXiv:2005.14165, appendix C).
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from gguforge.quant.errors import InputError
from gguforge.quant.imatrix import ImportanceMatrix, read_fingerprint, read_imatrix
from gguforge.quant.provenance import PREFIX
from gguforge.quant.reader import GGUFFile, read_gguf

RUN = 13  # words
KEPT = 32  # one hash in so many
MODEL_PREFIX = "quantize.imatrix."  # llama-quantize's keys about the importance matrix that it used
SELECTION_KEY = PREFIX + "selection.name"  # the text that the types of a file of a chosen size were measured on
HASH_KEYS = (MODEL_PREFIX + "text_sha256", PREFIX + "calibration.sha256", PREFIX + "selection.sha256")

_WORD = re.compile(r"\w+")


def fingerprint(text: str) -> frozenset[int]:
    """Hashes (64 bits) that stand for the text's passages; case, blanks and punctuation do not count.

    >>> words = [str(number) for number in range(1000)]
    >>> whole, part = fingerprint(" ".join(words)), fingerprint(", ".join(words[300:600]).upper())
    >>> part < whole, 0 < len(part) < len(whole) < 100
    (True, True)
    """
    words = _WORD.findall(text.lower())
    runs = (" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1))
    hashes = (int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs)
    return frozenset(number for number in hashes if number % KEPT == 0)


def shared(one: frozenset[int], other: frozenset[int]) -> float:
    """The share of the first text's passages that stand in the other as well, from 0 to 1."""
    return len(one & other) / len(one) if one else 0.0


@dataclass(frozen=True)
class Calibration:
    """What is known of the texts that a model was made with.

    Attributes:
        datasets: names of the calibration texts, without their folders.
        fingerprint: theirs, empty when it was not kept.
        selection: the name of the text that its types were chosen on.
        hashes: SHA-256 of all these texts, as far as they were kept, hexadecimal.
    """

    datasets: frozenset[str]
    fingerprint: frozenset[int]
    selection: str = ""
    hashes: frozenset[str] = frozenset()


def find_calibration(
    model: str | os.PathLike[str], imatrix: str | os.PathLike[str] | None = None
) -> Calibration | None:
    """Look for the calibration text in `imatrix`, in the model's metadata, and in the importance matrix that the
    metadata name, should it lie beside the model; None when the model knows of no text.

    Raises:
        InputError: the model or `imatrix` is damaged.
        OSError: one of them cannot be read.
    """
    file = read_gguf(model)
    found = _of_model(file) if imatrix is None else _of_matrix(read_imatrix(imatrix))
    selection, hashes = file.metadata.get(SELECTION_KEY), _hashes(file)
    if selection is None and not hashes:
        return found
    found = found or Calibration(frozenset(), frozenset())
    return replace(found, selection="" if selection is None else str(selection.value), hashes=found.hashes | hashes)


def _hashes(file: GGUFFile) -> frozenset[str]:
    values = [file.metadata[key].value for key in HASH_KEYS if key in file.metadata]
    return frozenset(str(item) for value in values for item in (value if isinstance(value, list) else [value]))


def _of_model(file: GGUFFile) -> Calibration | None:
    named = [file.metadata.get(MODEL_PREFIX + name) for name in ("file", "dataset")]
    matrix_name, dataset = (_base_name(entry.value) if entry is not None else "" for entry in named)
    kept = read_fingerprint(file, MODEL_PREFIX + "fingerprint")
    if not kept and matrix_name:
        with contextlib.suppress(InputError, OSError):  # it may be gone, or be something else by now
            return _of_matrix(read_imatrix(file.path.parent / matrix_name))
    return Calibration(frozenset({dataset} - {""}), kept) if kept or dataset else None


def _of_matrix(matrix: ImportanceMatrix) -> Calibration:
    names = frozenset(map(_base_name, matrix.datasets))
    return Calibration(names, matrix.fingerprint, hashes=frozenset(matrix.text_hashes))


def _base_name(path: object) -> str:
    return PurePosixPath(str(path).replace("\\", "/")).name


def same_name(text: str | os.PathLike[str], calibration: Calibration) -> bool:
    """Whether a text of this name went into the model: all that can be told where no fingerprint was kept."""
    name = Path(text).name
    return name == calibration.selection or (not calibration.fingerprint and name in calibration.datasets)
