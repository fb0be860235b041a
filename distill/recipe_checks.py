"""What a recipe's types alone do not say: which values make sense, and which tables belong together."""

from __future__ import annotations

from pathlib import Path

from gguforge.distill.recipe import Recipe
from gguforge.distill.run_tables import CollectPart
from gguforge.quant.errors import InputError
from gguforge.quant.presets import find_preset
from gguforge.quant.rules import NEED_IMPORTANCE

POSITIVE = {
    "data": ("context", "held_out_documents"),
    "schedule": ("steps", "batch", "accumulate", "rate", "clip", "evaluate", "save"),
    "losses": ("temperature", "relation_heads"),
    "on_policy": ("prompt", "tokens", "temperature", "refresh"),
    "blocks": ("refresh",),
    "generate": ("answers", "max_tokens", "min_characters", "context"),
    "collect": ("draws", "temperature"),
    "finish": ("steps", "rate"),
    "output": ("calibration_chunks",),
}
BETWEEN_0_AND_1 = ("beta", "skew")


def check(recipe: Recipe, path: Path) -> None:
    """What types alone do not say."""
    for part, names in POSITIVE.items():
        for name in names:
            value = getattr(getattr(recipe, part), name, 1)
            if not value > 0:
                raise InputError(f"key '{part}.{name}'", path=path, expected="more than 0", found=value)
    for name in BETWEEN_0_AND_1:
        if not 0 < getattr(recipe.losses, name) < 1:
            raise InputError(f"key 'losses.{name}'", path=path, expected="between 0 and 1")
    if recipe.losses.teacher_layer < 0:
        raise InputError(
            "key 'losses.teacher_layer'", path=path, expected="0 or more", found=recipe.losses.teacher_layer
        )
    if recipe.on_policy is not None and not 0 < recipe.on_policy.share <= 1:
        raise InputError("key 'on_policy.share'", path=path, expected="more than 0, at most 1")
    if not recipe.schedule.seeds:
        raise InputError("key 'schedule.seeds'", path=path, expected="at least one")
    if not recipe.losses.weights():
        raise InputError("has no loss", path=path, remedy="Give at least one of [losses] a weight.")
    _check_text(recipe, path)
    _check_models(recipe, path)
    if recipe.collect is not None:
        _check_collect(recipe, recipe.collect, path)
    if recipe.blocks is not None:
        find_preset(recipe.blocks.preset)
    if recipe.schedule.optimizer == "muon" and recipe.blocks is not None and recipe.finish is None:
        raise InputError("schedule.optimizer = 'muon' does not train on blocks", path=path, remedy="Add [finish].")
    if recipe.finish is not None and recipe.blocks is None:
        raise InputError("[finish] needs [blocks]: it trains on them", path=path)
    _check_output(recipe, path)


def _check_text(recipe: Recipe, path: Path) -> None:
    data = recipe.data
    text = bool(data.text) or recipe.generate is not None
    if text == (data.targets is not None):
        raise InputError("[data] needs either targets or text", path=path)
    if recipe.losses.sampled_kl and data.targets is None and recipe.collect is None:
        raise InputError(
            "losses.sampled_kl needs data.targets or [collect]", path=path, remedy="Or use losses.forward_kl."
        )
    if recipe.generate is not None and recipe.first_teacher is None:
        raise InputError("generate.teacher is missing", path=path, remedy="Name a GGUF file or a checkpoint's folder.")


def _check_collect(recipe: Recipe, part: CollectPart, path: Path) -> None:
    if recipe.data.targets is not None:
        raise InputError("[collect] makes the targets: leave data.targets out", path=path)
    if not part.teachers and recipe.teacher.checkpoint is None:
        raise InputError("collect.teachers is missing", path=path, remedy="Or name the checkpoint of [teacher].")
    if part.weights and len(part.weights) != len(part.teachers):
        raise InputError("key 'collect.weights'", path=path, expected=f"one for each of {len(part.teachers)} teachers")
    if min(part.weights, default=1) <= 0:
        raise InputError("key 'collect.weights'", path=path, expected="more than 0", found=min(part.weights))
    if (part.top_k is not None) + part.full + part.independent > 1:
        raise InputError("collect.top_k, full and independent exclude each other", path=path)


def _check_output(recipe: Recipe, path: Path) -> None:
    part = recipe.output
    if not part.name or part.name.startswith(".") or set(part.name) & set("/\\"):
        raise InputError("key 'output.name'", path=path, expected="the beginning of a file's name", found=part.name)
    for name in part.types or ():
        preset = find_preset(name)
        if preset.base in NEED_IMPORTANCE and not part.imatrix:
            raise InputError(
                f"{preset.name} needs an importance matrix", path=path, remedy="Set output.imatrix = true."
            )
    needs = "output.imatrix" if part.imatrix else "output.quality = 'best'" if part.quality == "best" else ""
    if needs and part.calibration is None and recipe.data.targets is not None:
        raise InputError(f"{needs} needs a text: output.calibration is missing", path=path)


def _check_models(recipe: Recipe, path: Path) -> None:
    student = recipe.student
    cut = student.layers is not None or student.hidden_size is not None or student.intermediate_size is not None
    if (student.checkpoint is not None) + (student.config is not None) + cut != 1:
        raise InputError(
            "[student] needs exactly one of: checkpoint; config; layers, hidden_size or intermediate_size", path=path
        )
    if (cut or recipe.needs_teacher) and recipe.teacher.checkpoint is None:
        why = "cutting the student from it" if cut else "these losses"
        raise InputError(f"teacher.checkpoint is needed for {why}", path=path)
    if student.config is not None and student.tokenizer is None and recipe.teacher.checkpoint is None:
        raise InputError("student.tokenizer is missing", path=path, remedy="Name the folder with its tokenizer.")
