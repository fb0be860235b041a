"""Text that the student writes itself: what it continues, that it learns from it, and that a run can be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.distill.batches import Reading, untaught
from gguforge.distill.footprint import footprint
from gguforge.distill.on_policy import OnPolicyObjective, OwnBatch, OwnReading, Voice, continuations, prompt_of
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Losses, OnPolicyPart, Schedule
from gguforge.distill.shards import Document
from gguforge.distill.trainer import Trainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 40
VOICE = Voice(VOCABULARY, frozenset({2}))
ALONE = Group(0, 1, torch.device("cpu"))
SCHEDULE = Schedule(steps=8, batch=3, accumulate=2, rate=5e-3, evaluate=100, save=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(seed: int, dropout: float = 0.0, hidden: int = 32) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=dropout, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def material(count: int = 7) -> list[Document]:
    draw = np.random.default_rng(5)
    found = []
    for i in range(count):
        ids = draw.integers(3, VOCABULARY, 10 + i % 3).astype(np.int32)
        found.append(untaught(ids, np.arange(len(ids)) > 0))
    return found


def trainer(
    part: OnPolicyPart, folder: Path | None = None, schedule: Schedule = SCHEDULE, group: Group = ALONE, **losses: float
) -> Trainer:
    student, teacher = model(0, dropout=0.1), model(1, hidden=48).eval().requires_grad_(False)
    reading = Reading(material(), schedule.batch, schedule.accumulate, 3, group.number, group.count)
    own = OwnReading(reading, part, student, VOICE, schedule.save)
    objective = OnPolicyObjective(Losses(**(losses or {"forward_kl": 1.0})), 1.0, part)
    return Trainer(student, objective, own, schedule, group, teacher=teacher, folder=folder)


def written(model: Any, prompts: list[Any], seed: int = 0, **settings: Any) -> list[list[int]]:
    settings = {"tokens": 6, "temperature": 1.0, "voice": VOICE, **settings}
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        found = continuations(model, [np.array(p, np.int32) for p in prompts], generator=generator, **settings)
    return [row.tolist() for row in found]


OTHERS = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "embd_pdrop": 0.0},
    "mistral": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "sliding_window": 4},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def of_family(name: str) -> Any:
    if name == "llama":
        return model(3).eval()
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        name, vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=1, eos_token_id=2, **OTHERS[name]
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_with_the_cache_and_padding_it_writes_what_whole_reading_says_is_most_likely(name: str) -> None:
    one = of_family(name)
    prompts = [[5, 9, 12, 7], [8], [30, 31, 3, 4, 5, 6, 7]]
    found = written(one, prompts, temperature=1e-4, voice=Voice(VOCABULARY, frozenset()))
    for prompt, continued in zip(prompts, found, strict=True):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                text.append(int(one(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert continued == text[len(prompt) :]


def test_writing_ends_with_an_end_token_and_draws_no_padding_of_the_vocabulary() -> None:
    one = model(3).eval()
    found = written(one, [[5]] * 200, voice=Voice(10, frozenset({4, 6})), temperature=3.0)
    assert all(max(row) < 10 for row in found)
    assert all(token not in (4, 6) for row in found for token in row[:-1])
    assert {len(row) for row in found} == set(range(1, 7))
    assert all(len(row) == 6 or row[-1] in (4, 6) for row in found)


def test_draws_follow_the_models_distribution() -> None:
    one = model(3).eval()
    with torch.no_grad():
        wanted = one(input_ids=torch.tensor([[5, 9]])).logits[0, -1].softmax(-1).numpy()
    found = np.bincount([row[0] for row in written(one, [[5, 9]] * 4000, tokens=1)], minlength=VOCABULARY) / 4000
    assert np.abs(found - wanted).max() < 0.04
    assert written(one, [[5, 9]] * 20, seed=1) == written(one, [[5, 9]] * 20, seed=1)
    assert written(one, [[5, 9]] * 20, seed=1) != written(one, [[5, 9]] * 20, seed=2)


def test_a_plain_text_is_continued_from_its_beginning_and_a_conversation_from_before_an_answer() -> None:
    ids = np.arange(20, dtype=np.int32)
    draw = np.random.default_rng(0)
    assert prompt_of(untaught(ids, ids > 0), 5, draw).tolist() == [0, 1, 2, 3, 4]
    assert len(prompt_of(untaught(ids, ids > 0), 50, draw)) == 10
    answers = ((ids >= 6) & (ids < 9)) | (ids >= 15)
    assert {len(prompt_of(untaught(ids, answers), 5, draw)) for _ in range(20)} == {6, 15}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_batches_is_written_and_only_what_was_written_counts(share: float) -> None:
    made = trainer(OnPolicyPart(share=share, prompt=3, tokens=5))
    batches = [batch for step in range(8) for batch in made.reading.made(step, "cpu")]
    own = [batch for batch in batches if isinstance(batch, OwnBatch)]
    assert len(own) == share * len(batches)
    for batch in own:
        assert batch.input_ids.shape[1] <= 3 + 5
        assert set((batch.places % batch.input_ids.shape[1]).tolist()) <= {2, 3, 4, 5, 6}
        assert len(batch.places) == int(batch.attention.sum()) - 3 * SCHEDULE.batch


@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon"])
def test_the_divergence_on_the_students_own_text_falls(loss: str) -> None:
    schedule = Schedule(steps=32, batch=8, rate=2e-2, evaluate=100, save=100)
    part = OnPolicyPart(share=1.0, prompt=4, tokens=6, loss=loss, refresh=4)  # type: ignore[arg-type]
    found = trainer(part, schedule=schedule).train().losses
    assert np.mean(found[-4:]) < 0.7 * np.mean(found[:4])


@pytest.mark.parametrize("refresh", [1, 5])
def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path: Path, refresh: int) -> None:
    part = OnPolicyPart(share=0.5, prompt=3, tokens=6, refresh=refresh)
    straight = trainer(part, tmp_path / "straight")
    straight.train()
    stopped = trainer(part, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.train(_stop_after(5))
    again = trainer(part, tmp_path / "stopped")
    assert again.resume()
    assert again.step == 3
    again.train()
    assert again.history.losses == straight.history.losses
    assert all(
        torch.equal(a, b) for a, b in zip(again.student.parameters(), straight.student.parameters(), strict=True)
    )


def _stop_after(step: int) -> Callable[[int, dict[str, float]], None]:
    def tell(made: int, losses: dict[str, float]) -> None:
        assert "on_policy" in losses
        if made == step:
            raise KeyboardInterrupt

    return tell


def test_data_are_trained_by_their_own_losses_and_the_teacher_reads_only_what_it_scores() -> None:
    made = trainer(OnPolicyPart(share=0.5, prompt=3, tokens=4), cross_entropy=1.0)
    read: list[int] = []
    made.teacher.register_forward_hook(lambda *_: read.append(made.step))
    told: list[dict[str, float]] = []
    made.train(lambda step, losses: told.append(losses))
    assert set(told[0]) == {"loss", "cross_entropy", "on_policy"}
    assert len(read) == 8  # one of the two batches of every step
    first, second = (sum(len(d.positions) for d in documents) for documents in made.reading.reading.batches(0))
    together = (told[0]["cross_entropy"] * first + told[0]["on_policy"] * second) / (first + second)
    assert told[0]["loss"] == pytest.approx(together, rel=1e-5)  # what is written counts as what it replaces


def test_the_memory_for_writing_counts_where_it_is_the_larger_part() -> None:
    config = model(0).config.to_dict()
    plain = footprint(10_000, config, 100)
    few, many = (footprint(10_000, config, 100, written=(count, 64)) for count in (1, 10_000))
    assert few.total == plain.total < many.total
    assert many.writing > 10_000 * 64 * 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32


TWO_PROCESSES = """
import sys
from pathlib import Path
import test_on_policy as t
from gguforge.distill.processes import processes
with processes("cpu", threads=1) as group:
    made = t.trainer(t.OnPolicyPart(share=0.5, prompt=3, tokens=6), group=group)
    made.train()
    weights = t.torch.cat([weight.flatten() for weight in made.student.parameters()]).tolist()
    Path(sys.argv[1], str(group.number)).write_text(f"{weights} {made.history.losses}")
"""


@pytest.mark.slow
def test_two_processes_write_their_own_texts_and_stay_one_model(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    found = []
    for name in ("once", "again"):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            [*words, sys.executable, "-c", TWO_PROCESSES, str(folder)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found += [(folder / number).read_text() for number in ("0", "1")]
    assert len(set(found)) == 1  # the same weights and losses in both processes, and from one start to the same
