"""The recipes in examples/, each run for two steps on a tiny teacher of the same architecture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import SMALL_K, TEMPLATE, Case, build, like

from gguforge.convert import convert
from gguforge.convert.architectures import find_architecture
from gguforge.distill.collect import Settings, collect
from gguforge.distill.recipe import Recipe, read_recipe
from gguforge.distill.teachers.open import TeacherSource
from gguforge.quant.errors import CheckpointError
from gguforge.quant.writer import verify

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill.train import train_recipe  # noqa: E402

CONTEXT = 96  # tokens; a conversation fits
EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = like(SMALL_K, num_hidden_layers=4, intermediate_size=256)
TEXT = "she sells sea shells on the shore; the quick brown fox jumps over the lazy dog. " * 6
TALK = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "jumps over the lazy dog"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that any recipe asks to have beside it."""
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    build(Case(CONFIG, files=files), tmp_path).rename(tmp_path / "teacher")
    for name in ("model", "small", "tokenizer"):
        shutil.copytree(tmp_path / "teacher", tmp_path / name)
    for name in ("train.txt", "held-out.txt"):
        (tmp_path / name).write_text(TEXT)
    for name in ("chats.jsonl", "train.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "tinyllama.json").write_text(json.dumps(like(CONFIG, num_hidden_layers=1)))
    return tmp_path


def shortened(folder: Path, name: str) -> Recipe:
    """The recipe in the folder, two steps of one document on the CPU."""
    shutil.copyfile(EXAMPLES / name, folder / name)
    recipe = read_recipe(folder / name)
    schedule = replace(recipe.schedule, steps=2, batch=1, accumulate=1, save=2, evaluate=2, seeds=(0,))
    student = recipe.student
    if student.layers is not None:
        student = replace(student, layers=2)
    if student.intermediate_size is not None:
        student = replace(student, intermediate_size=128)
    return replace(
        recipe,
        schedule=schedule,
        student=student,
        data=replace(recipe.data, context=CONTEXT),
        hardware=replace(recipe.hardware, device="cpu", threads=1),
    )


def collected(folder: Path, text: str) -> None:
    """Soft targets of the teacher as a GGUF file."""
    convert(folder / "teacher", folder / "teacher.gguf", type="Q8_0", workers=1)
    source = TeacherSource(str(folder / "teacher.gguf"), 1.0, 1)
    collect([source], [folder / text], folder / "targets", Settings(context=CONTEXT))


def test_every_example_is_read_and_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    recipes = sorted(EXAMPLES.glob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path).losses.weights()
        assert f"[{path.name}]({path.name})" in page


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama2-to-tinyllama.toml", "train.txt"),
        ("llama2-to-half.toml", ""),
        ("chat.toml", "chats.jsonl"),
        ("demo-model.toml", ""),
        ("on-blocks.toml", ""),
    ],
)
def test_recipes_run_on_a_tiny_llama(folder: Path, name: str, text: str) -> None:
    if text:
        collected(folder, text)
    trained = train_recipe(shortened(folder, name), folder / "out")
    assert len(trained.runs["student-0"].history.losses) == 2
    made = convert(folder / "out" / "checkpoint", folder / "student.gguf", type="Q8_0", workers=1)
    verify(made, folder / "student.gguf")
    assert (folder / "out" / "model.gguf").exists() == (name == "on-blocks.toml")


def test_gpt2_runs_on_a_tiny_gpt2(folder: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    try:
        find_architecture(config, folder / "config.json")
    except CheckpointError:
        pytest.skip("convert does not know GPT-2 yet")
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.rmtree(folder / "teacher")
    build(Case(CONFIG, tokenizer="byte_level", pre="gpt-2"), folder).rename(folder / "teacher")
    (folder / "teacher" / "model.safetensors").unlink()
    tiny = GPT2Config(vocab_size=CONFIG["vocab_size"], n_embd=64, n_layer=4, n_head=4, n_positions=64)
    GPT2LMHeadModel(tiny).save_pretrained(folder / "teacher")
    trained = train_recipe(shortened(folder, "gpt2-to-distilgpt2.toml"), folder / "out")
    assert len(trained.runs["student-0"].history.losses) == 2
