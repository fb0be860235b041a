"""Recipes: what is read, and that everything else is refused with one line that helps."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from gguforge.distill.identity import recipe_key
from gguforge.distill.recipe import Recipe, read_recipe
from gguforge.quant.errors import InputError

SMALLEST = """
[data]
targets = "targets"
[student]
checkpoint = "small"
[losses]
sampled_kl = 1
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_smallest_recipe_takes_defaults_and_paths_from_its_folder(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, SMALLEST))
    assert recipe.data.targets == tmp_path / "targets"
    assert recipe.student.checkpoint == tmp_path / "small"
    assert recipe.losses.weights() == {"sampled_kl": 1.0}
    assert (recipe.schedule.steps, recipe.hardware.device, recipe.blocks) == (1000, "auto", None)


def test_every_table_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(
            tmp_path,
            """
            [data]
            text = ["a.txt", "b.jsonl"]
            held_out = ["c.txt"]
            context = 128
            [teacher]
            checkpoint = "/models/big"
            [student]
            layers = [0, 2, 5]
            intermediate_size = 512
            [losses]
            forward_kl = 0.5
            hidden_cosine = 0.25
            temperature = 2
            [schedule]
            steps = 10
            rate = 1e-4
            seeds = [1, 2, 3]
            [hardware]
            device = "cpu"
            precision = "bfloat16"
            [blocks]
            preset = "q4_k_m"
            scales_only = true
            [report]
            baseline = false
            [generate]
            prompts = "prompts.jsonl"
            temperature = 0.8
            [collect]
            teachers = ["big.gguf", "http://host/v1#big"]
            weights = [2, 1]
            [finish]
            steps = 20
            [output]
            name = "tiny"
            types = ["q8_0", "Q4_K_M"]
            """,
        )
    )
    assert recipe.data.text == (tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert recipe.teacher.checkpoint == Path("/models/big")
    assert (recipe.student.layers, recipe.student.intermediate_size) == ((0, 2, 5), 512)
    assert recipe.losses.needs_teacher
    assert recipe.losses.temperature == 2.0
    assert recipe.blocks is not None
    assert recipe.blocks.scales_only
    assert recipe.schedule.seeds == (1, 2, 3)
    assert not recipe.report.baseline
    assert recipe.generate is not None
    assert recipe.generate.prompts == tmp_path / "prompts.jsonl"
    assert recipe.collect is not None
    assert recipe.collect.teachers == (str(tmp_path / "big.gguf"), "http://host/v1#big")
    assert recipe.collect.weights == (2.0, 1.0)
    assert recipe.stages == ["generate", "collect", "finish"]
    assert recipe.output.types == ("q8_0", "Q4_K_M")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[losses]", "[loses]", "unknown key 'loses'. Did you mean 'losses'?"),
        ("sampled_kl", "sampled_lk", "unknown key 'losses.sampled_lk'. Did you mean 'sampled_kl'?"),
        ("sampled_kl = 1", "sampled_kl = '1'", "key 'losses.sampled_kl' (expected a number, found '1')"),
        ("sampled_kl = 1", "sampled_kl = 0", "has no loss"),
        ("sampled_kl", "forward_kl", "teacher.checkpoint is needed for these losses"),
        ("sampled_kl = 1", "sampled_kl = 1\nbeta = 1.0", "key 'losses.beta' (expected between 0 and 1)"),
        ('targets = "targets"', "", "[data] needs either targets or text"),
        ('targets = "targets"', 'text = ["a.txt"]', "losses.sampled_kl needs data.targets"),
        ('targets = "targets"', "targets = 3", "key 'data.targets' (expected a path, found 3)"),
        ('targets = "targets"', 'targets = "t"\nheld_out = "h.txt"', "(expected a list, found 'h.txt')"),
        ('checkpoint = "small"', "layers = 3", "teacher.checkpoint is needed for cutting the student from it"),
        ('checkpoint = "small"', 'checkpoint = "small"\nlayers = 3', "[student] needs exactly one of"),
        ('checkpoint = "small"', 'config = "c.json"', "student.tokenizer is missing"),
        ("[student]", "[schedule]\nsteps = 0\n[student]", "key 'schedule.steps' (expected more than 0, found 0)"),
        ("[student]", "[schedule]\nsteps = 1.5\n[student]", "(expected a whole number, found 1.5)"),
        ("[student]", "[hardware]\ndevice = 'tpu'\n[student]", "expected 'auto' or 'cpu' or 'cuda' or 'mps'"),
        ("[student]", "[blocks]\npreset = 'Q9'\n[student]", "unknown type 'Q9'"),
        ("[student]", "[blocks]\n[student]", "key 'blocks.preset' is missing"),
        ("[student]", "blocks = 3\n[student]", "key 'data.blocks'"),
        ("[data]", "[data", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_recipe(write(tmp_path, SMALLEST.replace(old, new, 1)))
    text = str(caught.value)
    assert message.replace("key 'data.blocks'", "unknown key 'data.blocks'") in text
    assert "\n" not in text


def test_the_key_tells_what_decides_the_weights(tmp_path: Path) -> None:
    small = SMALLEST.replace('targets = "targets"', 'text = ["a.txt"]').replace("sampled_kl", "cross_entropy")
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home, away):
        (folder / "small").mkdir(parents=True)
        (folder / "small" / "config.json").write_text("{}")
        (folder / "a.txt").write_text("some text")

    def key(more: str = "", folder: Path = home) -> str:
        return recipe_key(read_recipe(write(folder, small + more)))

    one = key()
    assert key("[hardware]\nthreads = 1\n[report]\nbaseline = false\n[output]\nname = 'a'\n") == one
    assert key("[schedule]\nseeds = [5]\n") == one  # a run of its own
    assert key("[schedule]\nrate = 0.1\n") != one
    assert key(folder=away) == one
    (away / "a.txt").write_text("another text")
    assert key(folder=away) != one
    (away / "a.txt").unlink()
    with pytest.raises(InputError, match="no such file"):
        key(folder=away)


PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_page_on_recipes_names_every_key_and_no_other() -> None:
    named = {key for row in PAGE.splitlines() if row.startswith("|") for key in re.findall(r"`(\w+)`", row)}
    known = {one.name for part in get_type_hints(Recipe).values() for kind in kinds(part) for one in fields(kind)}
    assert named == known


def kinds(hint: Any) -> list[Any]:
    """The dataclasses in a type hint."""
    return [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]


@pytest.mark.parametrize("number", range(5))
def test_the_recipes_of_the_page_are_read(tmp_path: Path, number: int) -> None:
    section = PAGE.split("\n## ")[1 + number]
    example = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert read_recipe(write(tmp_path, example)).losses.weights()
