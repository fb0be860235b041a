"""Which texts may meet: what is measured on shares no passage with what models are tuned, trained or chosen on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gguforge.runtime.overlap import fingerprint, shared


def overlap(held_out: Sequence[Path], others: Sequence[Path]) -> float:
    """The share of the held-out passages that stand in the other texts as well."""
    joined = ("\n".join(path.read_text("utf-8", "replace") for path in paths) for paths in (held_out, others))
    return shared(*map(fingerprint, joined))


def refuse_overlap(held_out: Sequence[Path], others: Sequence[Path]) -> None:
    """End the program where texts share passages."""
    if share := overlap(held_out, others):
        names = [", ".join(path.name for path in paths) for paths in (held_out, others)]
        sys.exit(f"{share:.1%} of {names[0]} stands in {names[1]} as well")
