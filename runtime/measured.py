"""What an evaluation found, as a receipt holds it."""

from __future__ import annotations

import os
from pathlib import Path

from gguforge.quant.provenance import Measurement, identify, named_hash
from gguforge.quant.reader import read_gguf
from gguforge.quant.receipt import add_measurement
from gguforge.quant.sources import map_window
from gguforge.runtime.evaluate import Evaluation
from gguforge.runtime.logit_files import is_logit_file


def measurement(
    found: Evaluation, text: str | os.PathLike[str], against: str | os.PathLike[str], skip: int = 0
) -> Measurement:
    """An evaluation against a reference with the hashes of what it was made with.

    Args:
        found: what was measured.
        text: the text.
        against: the reference: a GGUF file, of which samples are hashed, or a file of its log-probabilities.
        skip: chunks of the text that were left out.
    """
    assert found.comparison is not None
    told = named_hash(text)
    offsets = [] if is_logit_file(against) else [tensor.offset for tensor in read_gguf(against).tensors]
    return Measurement(
        found.comparison.mean.value, found.comparison.mean.error, told["name"], told["sha256"], skip, found.chunks,
        found.context, Path(against).name, identify(against, offsets)["sample_sha256"],
    )  # fmt: skip


def note(measured: Measurement, model: str | os.PathLike[str]) -> None:
    """Write a measurement into the receipt that lies beside a model.

    Raises:
        InputError: there is none, or it is of another file.
    """
    file = read_gguf(model)
    add_measurement(file.path, bytes(map_window(str(file.path), 0, file.data_offset)), measured)
