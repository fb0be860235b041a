"""What the stages of a run need in memory, from headers and configs alone."""

from __future__ import annotations

import math
from pathlib import Path

from gguforge.convert.checkpoint import read_checkpoint
from gguforge.convert.json_file import read_object
from gguforge.distill.encoders.masking import scored
from gguforge.distill.footprint import BASE, FLOAT
from gguforge.distill.recipe import Recipe
from gguforge.distill.students import count_weights, cut_config
from gguforge.distill.train import memory_of
from gguforge.distill.workshop import student_config
from gguforge.quant.splits import read_model


def training_memory(recipe: Recipe) -> int:
    """Bytes of one process that trains.

    Raises:
        GGUForgeError: a config cannot be used.
        MissingExtraError: torch or transformers is not installed.
    """
    path, part, teacher = student_config(recipe), recipe.student, recipe.teacher.checkpoint
    config = read_object(path)
    if part.checkpoint is None and part.config is None:
        config = cut_config(config, part, path)[0]
    taught = 0
    if teacher is not None and (recipe.needs_teacher or recipe.data.held_out):
        taught = count_weights(read_object(teacher / "config.json"), teacher / "config.json")
    return memory_of(recipe, config, count_weights(config, path), taught, recipe.data.context, scored(config)).total


def model_memory(place: str | Path) -> int:
    """Bytes of one process that reads through a model: a GGUF file is mapped, a checkpoint becomes float32."""
    path = Path(place)
    if "://" in str(place):
        return BASE
    if path.is_dir():
        return BASE + FLOAT * sum(math.prod(tensor.shape) for tensor in read_checkpoint(path).tensors.values())
    return BASE + read_model(path).size
