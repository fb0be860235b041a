"""The training loop on a model of a few hundred weights: the same losses whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gguforge.distill.batches import Reading, make_batch, untaught
from gguforge.distill.objective import Objective
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Losses, Schedule
from gguforge.distill.shards import Document
from gguforge.distill.trainer import STATE, Trainer
from gguforge.quant.errors import DataError, InputError

torch = pytest.importorskip("torch")

VOCABULARY, WIDTH = 32, 8
ALONE = Group(0, 1, torch.device("cpu"))
SCHEDULE = Schedule(steps=8, batch=2, rate=1e-2, evaluate=4, save=2)
CE = Losses(cross_entropy=1.0)


class Tiny(torch.nn.Module):  # type: ignore[misc]
    """Predicts the next token from this one, with dropout, whose random numbers must be kept too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Any, attention_mask: Any, output_hidden_states: bool) -> Any:
        states = self.dropout(self.embedding(input_ids))
        return SimpleNamespace(logits=self.head(states), hidden_states=(states,))


def material(count: int = 6) -> list[Document]:
    """Documents in which each token is the last one plus one, of several lengths."""
    found = []
    for i in range(count):
        ids = ((np.arange(6 + i % 3) + 5 * i) % VOCABULARY).astype(np.int32)
        found.append(untaught(ids, np.arange(len(ids)) > 0))
    return found


def trainer(folder: Path | None = None, schedule: Schedule = SCHEDULE, **settings: Any) -> Trainer:
    reading = Reading(material(), schedule.batch, schedule.accumulate, seed=3)
    settings.setdefault("student", Tiny())
    settings.setdefault("objective", Objective(CE))
    return Trainer(reading=reading, schedule=schedule, group=ALONE, folder=folder, **settings)


def stop_after(step: int) -> Callable[[int, dict[str, float]], None]:
    """Tells by raising, as a killed process would end."""

    def tell(number: int, losses: dict[str, float]) -> None:
        if number == step:
            raise KeyboardInterrupt

    return tell


def test_training_learns() -> None:
    losses = trainer(schedule=replace(SCHEDULE, steps=200, rate=0.05)).train().losses
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path: Path, step: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    killed = trainer(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.train(stop_after(step))
    again = trainer(tmp_path / "killed", student=Tiny(seed=9))
    assert again.resume() == (step > 2)
    if step <= 2:
        again = trainer(tmp_path / "killed")
    again.train()
    assert again.history.losses == whole.history.losses
    for one, other in zip(again.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    def trained(batch: int, accumulate: int) -> Trainer:
        student = Tiny()
        student.dropout.p = 0.0
        schedule = replace(SCHEDULE, batch=batch, accumulate=accumulate, steps=3)
        made = Trainer(student, Objective(CE), Reading(material(8), batch, accumulate, 3), schedule, ALONE)
        made.train()
        return made

    large, small = trained(4, 1), trained(2, 2)
    assert large.history.losses == pytest.approx(small.history.losses, rel=1e-5)


def test_a_step_reads_documents_of_like_length_together() -> None:
    documents = material(8)
    step = Reading(documents, 2, 4, seed=3).batches(0)
    lengths = [[len(document.input_ids) for document in batch] for batch in step]
    assert [one for some in lengths for one in some] == sorted(len(document.input_ids) for document in documents)
    assert len({id(document) for batch in step for document in batch}) == 8


def test_muon_is_taken_up_again_to_the_same_losses(tmp_path: Path) -> None:
    muon = replace(SCHEDULE, optimizer="muon", rate=0.02)
    whole = trainer(schedule=muon).train().losses
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, muon).train(stop_after(5))
    again = trainer(tmp_path, muon)
    again.resume()
    assert again.train().losses == whole
    assert whole != trainer().train().losses


def test_a_loss_that_became_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path)

    def poison(step: int, losses: dict[str, float]) -> None:
        if step == 5:
            made.student.head.bias.data.fill_(float("nan"))

    with pytest.raises(DataError) as caught:
        made.train(poison)
    assert "step 6: the loss became nan. The checkpoint of step 4 is kept." in str(caught.value)
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 4
    assert all(bool(weight.isfinite().all()) for weight in again.student.parameters())


def test_a_gradient_that_became_infinite_stops_too() -> None:
    made = trainer()
    made.student.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DataError, match="step 1: a gradient became NaN or infinite"):
        made.train()


def test_patience_ends_training_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 2.6, 0.0])
    kept: list[Any] = []
    schedule = replace(SCHEDULE, steps=50, evaluate=2, save=50, patience=2)

    def measure() -> float:
        kept.append(made.student.head.weight.detach().clone())
        return next(values)

    made = trainer(tmp_path, schedule, held_out=measure)
    history = made.train()
    assert [step for step, _ in history.held_out] == [2, 4, 6, 8]
    assert made.step == 8
    assert torch.equal(made.student.head.weight, kept[1])
    assert not torch.equal(kept[1], kept[3])


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, key="one").train()
    with pytest.raises(InputError, match="of another recipe"):
        trainer(tmp_path, key="other").resume()


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: data[:-50] + b"x" * 50])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    trainer(tmp_path).train()
    path = tmp_path / STATE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="checkpoint is damaged"):
        trainer(tmp_path).resume()


def test_bfloat16_computes_the_forward_pass_only() -> None:
    full, half = trainer(), trainer(bfloat16=True)
    full.student.dropout.p = half.student.dropout.p = 0.0
    full.train()
    half.train()
    assert all(weight.dtype == torch.float32 for weight in half.student.parameters())
    assert half.history.losses != full.history.losses
    assert half.history.losses == pytest.approx(full.history.losses, rel=0.05)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "hidden_mse", "relation"])
def test_a_teacher_in_memory_draws_the_student_to_itself(name: str) -> None:
    losses = Losses(**{name: 1.0, "relation_heads": 2})
    schedule = replace(SCHEDULE, steps=120, rate=0.05)
    teacher = Tiny(seed=5).eval()
    student = Tiny()
    student.dropout.p = 0.0
    found = trainer(None, schedule, student=student, objective=Objective(losses), teacher=teacher).train().losses
    assert np.mean(found[-10:]) < 0.5 * found[0]


def test_padding_changes_nothing() -> None:
    long, short = material()[2], material()[0]
    student = Tiny().eval()
    objective = Objective(Losses(cross_entropy=1.0))

    def loss(documents: list[Document]) -> Any:
        batch = make_batch(documents)
        out = student(batch.input_ids, None, False)
        return objective.total(objective(batch, SimpleNamespace(scores=out.logits.flatten(0, 1)[batch.places]), None))

    with torch.no_grad():
        together, apart = loss([long, short]), (loss([long]), loss([short]))
    sizes = len(long.positions), len(short.positions)
    assert float(together) == pytest.approx(
        float(sum(part * size for part, size in zip(apart, sizes, strict=True)) / sum(sizes))
    )


def test_every_round_reads_every_document_once_and_processes_share_them() -> None:
    documents = material(12)
    readings = [Reading(documents, 2, 3, seed=1, process=number, processes=2) for number in range(2)]
    read = [id(d) for reading in readings for batch in reading.batches(0) for d in batch]
    assert sorted(read) == sorted(map(id, documents))
    again = [id(d) for reading in readings for batch in reading.batches(1) for d in batch]
    assert sorted(again) == sorted(read)
    assert again != read
    assert [[id(d) for d in batch] for batch in readings[0].batches(0)] == [
        [id(d) for d in batch] for batch in Reading(documents, 2, 3, seed=1, processes=2).batches(0)
    ]


TWO_PROCESSES = """
import sys
from dataclasses import replace
import test_trainer as t
from gguforge.distill.processes import processes
from gguforge.distill.batches import Reading
with processes("cpu", threads=1) as group:
    student = t.Tiny()
    student.dropout.p = 0.0
    documents = [t.untaught((t.np.arange(6) + i).astype(t.np.int32), t.np.arange(6) > 0) for i in range(8)]
    schedule = replace(t.SCHEDULE, batch=4 // group.count, steps=3)
    reading = Reading(documents, schedule.batch, 1, 3, group.number, group.count)
    losses = t.Trainer(student, t.Objective(t.CE), reading, schedule, group).train().losses
    if group.first:
        print(*(f"{loss:.6f}" for loss in losses))
"""


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one() -> None:
    found = []
    for count in (1, 2):
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--no-python"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*words, sys.executable, "-c", TWO_PROCESSES], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append([float(word) for word in done.stdout.split()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
