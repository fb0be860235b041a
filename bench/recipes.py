"""What the recipes in examples/ take: memory of one process, arithmetic of one run, and seconds measured on one core.

    python bench/recipes.py [--measure] [--tflops 40]

Teachers have the shapes of the real ones, which are transformers' default configs, and random weights. Memory is what
`gguforge distill train` announces. Hours are an estimate: six operations a weight and token to train, two to read, at a
speed that is assumed (--tflops). --measure times a step of 256 tokens on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gguforge.convert.json_file import read_object
from gguforge.distill import students
from gguforge.distill.batches import Batch, make_batch, untaught
from gguforge.distill.encoders.masking import encoder_batch, scored
from gguforge.distill.encoders.text import Words
from gguforge.distill.objective import Objective
from gguforge.distill.recipe import Recipe, read_recipe
from gguforge.distill.train import memory_of

EXAMPLES = Path(__file__).parents[1] / "examples"
ROBERTA = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514)
TEACHERS = {
    "gpt2-to-distilgpt2": ("GPT2LMHeadModel", transformers.GPT2Config()),
    "bert-to-distilbert": ("BertForMaskedLM", transformers.BertConfig()),
    "bert-to-minilm": ("BertForMaskedLM", transformers.BertConfig()),
    "roberta-to-minilm": (
        "RobertaForMaskedLM",
        ROBERTA,
    ),
    "embedding": ("BertModel", transformers.BertConfig()),
    "llama2-to-half": ("LlamaForCausalLM", transformers.LlamaConfig()),
    "llama2-to-tinyllama": ("LlamaForCausalLM", transformers.LlamaConfig()),
}
LARGEST = 1 << 28  # weights of a model that is measured
TOKENS, REPEATS = 256, 3  # of a step that is measured


def laid(folder: Path, name: str) -> Recipe:
    """A recipe with its teacher's config beside it; embedding.toml goes on with the student of bert-to-minilm.toml."""
    architecture, config = TEACHERS[name]
    for place in ("teacher", "small"):
        (folder / place).mkdir()
    content = config.to_dict() | {"architectures": [architecture]}
    (folder / "teacher" / "config.json").write_text(json.dumps(content))
    (folder / "small" / "config.json").write_bytes((EXAMPLES / "minilm.json").read_bytes())
    for path in EXAMPLES.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "recipe.toml").write_bytes((EXAMPLES / f"{name}.toml").read_bytes())
    return read_recipe(folder / "recipe.toml")


def configs(recipe: Recipe, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's and the teacher's."""
    teacher, part = read_object(folder / "teacher" / "config.json"), recipe.student
    if part.config is not None:
        return read_object(part.config), teacher
    if part.checkpoint is not None:
        return read_object(part.checkpoint / "config.json"), teacher
    return students.cut_config(teacher, part, folder)[0], teacher


def multiplied(config: dict[str, Any], path: Path, head: float) -> float:
    """Weights that a token is multiplied with: no tables, and of the head a share."""
    with torch.device("meta"):
        model = students.model_class(config, path)(students.model_class(config, path).config_class.from_dict(config))
    body = sum(weight.numel() for weight in model.base_model.parameters() if weight.ndim > 1)
    tables = sum(one.weight.numel() for one in model.modules() if isinstance(one, torch.nn.Embedding))
    output = model.get_output_embeddings()
    return body - tables + (0.0 if output is None else head * output.weight.numel())


def step(recipe: Recipe, student: dict[str, Any], teacher: dict[str, Any], folder: Path) -> Iterator[float]:
    """Seconds of some steps, the first left out."""
    torch.set_num_threads(1)
    small, large = (students.fresh_model(one, folder, 0) for one in (student, teacher))
    objective = Objective(recipe.losses, causal=not students.is_encoder(student))
    optimizer, batch = torch.optim.AdamW(small.parameters()), batch_of(recipe, student)
    for number in range(REPEATS + 1):
        begun = time.process_time()
        with torch.no_grad():
            wanted = objective.read(large, batch, teacher=True)
        objective.total(objective(batch, objective.read(small, batch), wanted)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:
            yield time.process_time() - begun


def batch_of(recipe: Recipe, student: dict[str, Any]) -> Batch:
    """Documents of so many tokens together."""
    length = min(TOKENS, recipe.data.context)
    ids = np.random.default_rng(0).integers(10, 10_000, (TOKENS // length, length)).astype(np.int32)
    documents = [untaught(row, np.arange(len(row)) > 0) for row in ids]
    if not students.is_encoder(student):
        return make_batch(documents)
    words = Words(4, 0, 10_000, np.arange(10, 10_000)) if scored(student) else None
    return encoder_batch(documents, 0, words=words)


def show(name: str, tflops: float, measure: bool) -> None:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = laid(folder, name)
        student, teacher = configs(recipe, folder)
        online = recipe.needs_teacher or bool(recipe.data.held_out and recipe.teacher.checkpoint)
        share = scored(student)
        weights, taught = (students.count_weights(one, folder) for one in (student, teacher))
        schedule, context = recipe.schedule, recipe.data.context
        need = memory_of(recipe, student, weights, taught if online else 0, context, share).total
        tokens = schedule.steps * schedule.batch * schedule.accumulate * context
        each = 6 * multiplied(student, folder, share) + 2 * multiplied(teacher, folder, share)
        cells = [name, f"{weights / 1e6:,.0f} M", f"{need / 2**30:.1f} GiB", f"{tokens / 1e6:,.0f} M"]
        cells += [f"{tokens * each:.1e}", f"{tokens * each / tflops / 1e12 / 3600:.1f} h"]
        if measure and taught < LARGEST:
            seconds = statistics.median(step(recipe, student, teacher, folder))
            cells += [f"{1000 * seconds / TOKENS:.1f} s", f"{TOKENS * each / seconds / 1e9:.0f} GFLOP/s"]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time a step on one thread")
    parser.add_argument("--tflops", type=float, default=40.0, help="assumed speed of the accelerator")
    options = parser.parse_args()
    head = "recipe", "student", "memory", "tokens", "operations", "time", "1,000 tokens on one core", "speed there"
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in TEACHERS:
        show(name, options.tflops, options.measure)


if __name__ == "__main__":
    main()
