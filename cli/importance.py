"""The options about an importance matrix, and the guide that is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gguforge.quant.quantize import Guide


@dataclass(frozen=True)
class Importance:
    """Which importance matrix, and what of it."""

    imatrix: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]


IMPORTANCE_OPTIONS = (
    click.option("--imatrix", type=click.Path(), help="An importance matrix (gguforge calibrate makes one)."),
    click.option("--include-weights", "include", multiple=True, metavar="NAME", help="Use only entries so named."),
    click.option("--exclude-weights", "exclude", multiple=True, metavar="NAME", help="Leave out entries so named."),
)


def read_guide(path: str | None, include: tuple[str, ...], exclude: tuple[str, ...]) -> Guide | None:
    """The importance matrix, reduced to the entries that are wanted.

    Raises:
        UsageError: entries are both named and left out, or there is no matrix to take them from.
    """
    if include and exclude:
        raise click.UsageError("--include-weights and --exclude-weights cannot be used together.")
    if path is None:
        if include or exclude:
            raise click.UsageError("--include-weights and --exclude-weights need --imatrix.")
        return None
    from gguforge.quant.imatrix import read_imatrix
    from gguforge.quant.quantize import Guide

    return Guide.from_matrix(read_imatrix(path), path, include, exclude)
