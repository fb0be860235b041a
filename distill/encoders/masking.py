"""Batches for encoders: as they are, or with some words hidden, which are to be found again.

Of the ordinary tokens of every document 15 % are chosen, at least one. Of these 80 % become the mask, 10 % another
token, and 10 % stay: BERT (arXiv:1810.04805), section 3.1. What is hidden at a step is a function of the seed, the
step, the batch and the process alone, so that a run that is taken up again hides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguforge.distill.batches import Batch, Reading
from gguforge.distill.encoders.text import Words
from gguforge.distill.shards import Document, Ids
from gguforge.distill.students import architecture, is_encoder

SHARE, MASKED, REPLACED = 0.15, 0.8, 0.1
HIDING = 0x686964  # keeps these draws apart from those that order the documents

Places = NDArray[np.int64]


def scored(config: Mapping[str, Any]) -> float:
    """Share of the tokens that a student's head is applied to, by its config.json: all, the hidden ones, or none."""
    if not is_encoder(config):
        return 1.0
    return SHARE if has_head(config) else 0.0


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether an encoder names hidden words."""
    return "ForMaskedLM" in architecture(config)


def hidden(ids: Ids, words: Words, draw: np.random.Generator) -> tuple[Ids, Places]:
    """A document's tokens with some of them hidden, and where those are."""
    places = np.flatnonzero(words.is_ordinary[ids])
    count = max(1, round(SHARE * len(places)))
    chosen = np.sort(draw.permutation(places)[:count])
    fate, other = draw.random(len(chosen)), words.ordinary[draw.integers(len(words.ordinary), size=len(chosen))]
    made = ids.copy()
    made[chosen] = np.select([fate < MASKED, fate < MASKED + REPLACED], [words.mask, other], ids[chosen])
    return made, chosen


def encoder_batch(
    chosen: Sequence[Document], pad: int, device: Any = "cpu", words: Words | None = None, key: Sequence[int] = ()
) -> Batch:
    """Documents side by side.

    Args:
        pad: the token behind the shorter ones.
        words: hides words of this vocabulary; None hides none, and no place is scored.
        key: decides which.
    """
    import torch

    length = max(len(document.input_ids) for document in chosen)
    ids = np.full((len(chosen), length), pad, np.int64)
    attention = np.zeros((len(chosen), length), np.bool_)
    places: list[Places] = [np.zeros(0, np.int64)]
    tokens: list[Ids] = [np.zeros(0, np.int32)]
    draw = np.random.default_rng([HIDING, *key])
    for i, document in enumerate(chosen):
        seen, count = document.input_ids, len(document.input_ids)
        if words is not None:
            seen, where = hidden(document.input_ids, words, draw)
            places.append(where + i * length)
            tokens.append(document.input_ids[where])
        ids[i, :count], attention[i, :count] = seen, True
    arrays = ids, attention, np.concatenate(places), np.concatenate(tokens).astype(np.int64)
    input_ids, there, where, came = (torch.from_numpy(array).to(device) for array in arrays)
    return Batch(input_ids, there, where, came, None)


@dataclass(frozen=True, eq=False)
class EncoderReading(Reading):
    """What an encoder reads.

    Attributes:
        pad: the token behind the shorter documents.
        words: hides words of this vocabulary; None hides none.
    """

    pad: int = 0
    words: Words | None = None

    def made(self, step: int, device: Any) -> Iterator[Batch]:
        """The batches of a step."""
        for number, chosen in enumerate(self.batches(step)):
            yield encoder_batch(chosen, self.pad, device, self.words, (self.seed, step, number, self.process))
