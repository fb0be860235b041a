"""The recipes in examples/, each followed for two steps on tiny stand-ins of the same architecture and the same layers.

Of a recipe only its sizes are changed: steps, texts' lengths, and widths where the stand-in is narrower.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import SMALL_K, TEMPLATE, Case, build, like
from learned_checkpoints import GPT2_K, gpt2
from running import run
from stand_ins import bert, roberta, sentences

from gguforge.convert import convert
from gguforge.distill.recipe import read_recipe
from gguforge.quant.reader import read_gguf
from gguforge.runtime.library import load_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = Path(__file__).parents[2] / "distill" / "demo_model"
TEXT = "she sells sea shells on the shore\nthe quick brown fox jumps over the lazy dog\n" * 12
TALK = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "jumps over the lazy dog"}]
SMALL: dict[str, dict[str, Any]] = {
    "data": {"context": 48, "held_out_documents": 4},
    "schedule": {"steps": 2, "batch": 2, "accumulate": 1, "save": 2, "evaluate": 2, "seeds": [0]},
    "hardware": {"device": "cpu", "threads": 1},
}
DEEP = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 96,
}  # 12 layers as BERT, 48 heads of relations
NARROW = {"hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 66}

Lay = Callable[[Path], None]


def llama(folder: Path, name: str, config: dict[str, Any] = SMALL_K, **changes: Any) -> Path:
    """A Llama that chats."""
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    return build(Case(like(config, intermediate_size=256, **changes), files=files), folder).rename(folder / name)


def lay_gpt2(folder: Path) -> None:
    build(gpt2(like(GPT2_K, n_layer=12)), folder).rename(folder / "teacher")


def lay_half(folder: Path) -> None:
    llama(folder, "teacher", num_hidden_layers=32)


def lay_tinyllama(folder: Path) -> None:
    config = json.loads((EXAMPLES / "tinyllama.json").read_text())
    llama(folder, "teacher")
    sizes = {key: SMALL_K[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")}
    (folder / "tinyllama.json").write_text(json.dumps(like(config, **sizes, intermediate_size=256)))


def lay_model(folder: Path) -> None:
    llama(folder, "model")


def lay_chat(folder: Path) -> None:
    shutil.copytree(DEMO, folder / "small")
    convert(DEMO, folder / "teacher.gguf", type="Q8_0", workers=1)
    prompts = (f"What is gguforge? Say it in {count} words." for count in range(20, 44))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "held-out.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")


def lay_encoder(teacher: Callable[..., Path], student: str = "") -> Lay:
    def lay(folder: Path) -> None:
        made = teacher(folder / "teacher", **DEEP)
        if student:
            vocabulary = json.loads((made / "config.json").read_text())["vocab_size"]
            config = json.loads((EXAMPLES / student).read_text())
            (folder / student).write_text(json.dumps(like(config, vocab_size=vocabulary, **NARROW)))

    return lay


def lay_embedding(folder: Path) -> None:
    sentences(folder / "teacher", **DEEP)
    bert(folder / "small", architectures=["BertModel"], **{**NARROW, "num_attention_heads": 12})


CASES: dict[str, tuple[Lay, dict[str, Any]]] = {
    "gpt2-to-distilgpt2.toml": (lay_gpt2, {}),
    "llama2-to-half.toml": (lay_half, {"student": {"intermediate_size": 128}}),
    "llama2-to-tinyllama.toml": (lay_tinyllama, {}),
    "chat.toml": (lay_chat, {"data": {"context": 160}, "generate": {"max_tokens": 96}}),
    "on-blocks.toml": (lay_model, {}),
    "bert-to-distilbert.toml": (lay_encoder(bert), {}),
    "bert-to-minilm.toml": (lay_encoder(bert, "minilm.json"), {}),
    "roberta-to-minilm.toml": (lay_encoder(roberta, "minilm-roberta.json"), {}),
    "embedding.toml": (lay_embedding, {}),
}
OTHERS = {"demo-model.toml"}
"""Followed by the tests of the demo model."""


def smaller(name: str, changes: dict[str, Any]) -> str:
    """A recipe with other sizes, as TOML."""
    recipe = tomllib.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    for table, values in [*SMALL.items(), *changes.items()]:
        recipe.setdefault(table, {}).update(values)
    tables = (
        "\n".join([f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())])
        for table, values in recipe.items()
    )
    return "\n".join(tables) + "\n"


def test_every_example_is_read_listed_and_followed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    recipes = sorted(EXAMPLES.glob("*.toml"))
    for path in recipes:
        assert read_recipe(path).losses.weights()
        assert f"[{path.name}]({path.name})" in page
        assert f"gguforge distill run {path.name}" in path.read_text(encoding="utf-8")
    assert {path.name for path in recipes} == CASES.keys() | OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_ends_in_files_that_open(tmp_path: Path, name: str) -> None:
    lay, changes = CASES[name]
    for text in ("train.txt", "held-out.txt"):
        (tmp_path / text).write_text(TEXT)
    lay(tmp_path)
    (tmp_path / name).write_text(smaller(name, changes))
    done = run("distill", "run", tmp_path / name, "-o", tmp_path / "out", "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["training"]["runs"]["student-0"]["losses"]) == 2
    assert report["files"]
    for file in report["files"]:
        assert read_gguf(file["file"]).tensors
        assert load_model(Path(file["file"]))
