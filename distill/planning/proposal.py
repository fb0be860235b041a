"""A proposal as files: a recipe that `gguforge distill run` takes, and the config.json of a student that is new."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguforge.distill.planning.cost import BATCH, CONTEXT, Cost
from gguforge.distill.planning.family import Family
from gguforge.distill.planning.search import Candidate, Limits
from gguforge.distill.planning.shapes import BILLION
from gguforge.quant.errors import InputError
from gguforge.quant.files import check_target, replacing

RATE_OF_CUT = 1e-4
RATES = ((10**8, 1e-3), (BILLION, 6e-4), (1 << 62, 3e-4))
"""Learning rates of students that are new, by weights below."""


@dataclass(frozen=True)
class Material:
    """What the recipe is to read.

    Attributes:
        text, held_out: files to train and to measure on.
        tokenizer: a folder with the tokenizer's files, for a teacher that is a GGUF file.
    """

    text: Sequence[Path]
    held_out: Sequence[Path] = ()
    tokenizer: Path | None = None

    def check(self, family: Family) -> None:
        """Whether a recipe can be made of it.

        Raises:
            InputError: there is no teacher, or a text or its tokenizer is not at hand.
        """
        if family.teacher is None:
            raise InputError("a recipe needs a teacher", remedy="Give --teacher.")
        if not family.can_be_cut and self.tokenizer is None:
            raise InputError(
                "the student's tokenizer is missing", path=family.teacher,
                remedy="Give the folder with its files: --tokenizer.",
            )  # fmt: skip
        for place in (*self.text, *self.held_out, self.tokenizer):
            if place is not None and not place.exists():
                raise InputError("there is no such file or folder", path=place)


def write_proposal(
    path: Path, best: Candidate, cost: Cost, family: Family, limits: Limits, material: Material, overwrite: bool = False
) -> list[Path]:
    """Write the recipe, and beside it `<name>.config.json` for a student that is new.

    Args:
        material: checked.
        overwrite: replace files that exist.

    Returns:
        The files.

    Raises:
        OutputError: a file is in the way, or cannot be written.
    """
    config = None if best.shape.cut else path.with_suffix(".config.json")
    texts = {path: recipe_text(path, best, cost, family, limits, material, config)}
    if config is not None:
        texts[config] = json.dumps(family.config_of(best.shape), indent=2) + "\n"
    for file in texts:
        check_target(file, overwrite)
    for file, text in texts.items():
        data = text.encode()
        with replacing(file, len(data), overwrite) as part:
            part.write_bytes(data)
    return list(texts)


def recipe_text(
    path: Path, best: Candidate, cost: Cost, family: Family, limits: Limits, material: Material, config: Path | None
) -> str:
    """The recipe; paths are relative to it."""

    def place(one: Path) -> str:
        return json.dumps(os.path.relpath(one, path.parent))

    def places(some: Sequence[Path]) -> str:
        return f"[{', '.join(map(place, some))}]"

    assert family.teacher is not None
    steps = max(1, cost.tokens // (BATCH * CONTEXT))
    speed = "" if limits.speed is None else f" and {limits.speed:g} tokens/s"
    lines = [f"# {best.shape}: for {limits.memory / 1e6:.0f} MB{speed} with {limits.preset}", ""]
    lines += ["[data]", f"text = {places(material.text)}"]
    lines += [f"held_out = {places(material.held_out)}"] if material.held_out else []
    lines += [f"context = {CONTEXT}", ""]
    if family.can_be_cut:
        lines += ["[teacher]", f"checkpoint = {place(family.teacher)}", ""]
    else:
        lines += ["[collect]", f"teachers = {places([family.teacher])}", ""]
    tokenizer = [] if material.tokenizer is None else [f"tokenizer = {place(material.tokenizer)}"]
    lines += ["[student]", *tokenizer, *_student(best, family, config), ""]
    lines += ["[losses]", f"{'forward_kl' if family.can_be_cut else 'sampled_kl'} = 0.9", "cross_entropy = 0.1", ""]
    lines += ["[schedule]", f"steps = {steps}", f"batch = {BATCH}", f"rate = {_rate(best):g}"]
    lines += [f"evaluate = {max(1, steps // 20)}", f"save = {max(1, steps // 20)}", ""]
    lines += ["[output]", f"types = [{json.dumps(limits.preset)}]"]
    return "\n".join(lines) + "\n"


def _student(best: Candidate, family: Family, config: Path | None) -> list[str]:
    if config is not None:
        return [f"config = {json.dumps(config.name)}"]
    whole, shape = family.shape, best.shape
    lines = [f"layers = {shape.layers}"]
    if (shape.hidden, shape.ffn) != (whole.hidden, whole.ffn):
        lines += [f"hidden_size = {shape.hidden}", f"intermediate_size = {shape.ffn}"]
    return lines


def _rate(best: Candidate) -> float:
    if best.shape.cut:
        return RATE_OF_CUT
    return next(rate for weights, rate in RATES if best.shape.body < weights)
