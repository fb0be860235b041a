"""The training loop: steps, checkpoints, measurements on held-out text, and when to stop.

A run can be killed at any moment: taken up again it goes on from its last checkpoint to the same losses, because what
is read at a step depends on the step alone, and everything else is in the checkpoint. Checkpoints appear whole.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguforge.distill.batches import Batch, Reading
from gguforge.distill.grid import Grid
from gguforge.distill.objective import Objective
from gguforge.distill.processes import Group
from gguforge.distill.recipe import Schedule
from gguforge.quant.errors import DataError, InputError
from gguforge.quant.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from gguforge.distill.on_policy import OwnReading

STATE = "state.pt"
BEST = "best.pt"

Tell = Callable[[int, dict[str, float]], None]


def rate(step: int, part: Schedule) -> float:
    """The learning rate at a step, counted from 0: a linear rise, then half a cosine.

    >>> part = Schedule(steps=100, rate=1.0, warmup=0.1, final=0.0)
    >>> [round(rate(step, part), 2) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(part.warmup * part.steps))
    if step < rise:
        return part.rate * (step + 1) / rise
    through = (step - rise) / max(1, part.steps - rise)
    return part.rate * (part.final + (1 - part.final) * 0.5 * (1 + math.cos(math.pi * through)))


@dataclass
class History:
    """What a run has seen.

    Attributes:
        losses: the weighted loss of every step, mean over batches and processes.
        held_out: step and loss of every measurement.
    """

    losses: list[float]
    held_out: list[tuple[int, float]]

    @property
    def best(self) -> float:
        """The smallest held-out loss so far."""
        return min((loss for _, loss in self.held_out), default=math.inf)

    def waited(self) -> int:
        """Measurements since the best."""
        values = [loss for _, loss in self.held_out]
        return len(values) - 1 - values.index(min(values)) if values else 0


class Trainer:
    """A student on its way.

    Args:
        student: a model whose parameters are float32, on the group's device.
        objective: what it is trained by.
        reading: what it reads.
        schedule: how.
        group: the processes.
        teacher: in memory, for online losses.
        grid: the blocks that the student is held on.
        bfloat16: compute the forward pass in bfloat16.
        folder: where checkpoints go; None for none.
        key: identifies the recipe; a checkpoint of another is refused.
        held_out: measures the student; the smaller the better.

    Attributes:
        step: steps that were made.
        history: what was seen.
    """

    def __init__(
        self,
        student: Any,
        objective: Objective,
        reading: Reading | OwnReading,
        schedule: Schedule,
        group: Group,
        *,
        teacher: Any = None,
        grid: Grid | None = None,
        bfloat16: bool = False,
        folder: Path | None = None,
        key: str = "",
        held_out: Callable[[], float] | None = None,
    ) -> None:
        self.student, self.objective, self.reading, self.schedule, self.group = (
            student, objective, reading, schedule, group,
        )  # fmt: skip
        self.teacher, self.grid, self.bfloat16, self.key, self.held_out = teacher, grid, bfloat16, key, held_out
        self.folder = folder
        self.step, self.history = 0, History([], [])
        self.learning: list[Tensor] = list(student.parameters()) if grid is None else grid.masters
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        import torch

        if self.schedule.optimizer == "muon" and self.grid is None:
            from gguforge.distill.muon import Muon

            return Muon(self.student, self.schedule.rate, self.schedule.weight_decay)
        matrices = [weight for weight in self.learning if weight.ndim >= 2]
        vectors = [weight for weight in self.learning if weight.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([one for one in groups if one["params"]], lr=self.schedule.rate, betas=(0.9, 0.95))

    def train(self, tell: Tell = lambda step, losses: None) -> History:
        """Go on to the end of the schedule, or until patience is at an end.

        Args:
            tell: called after each step with its number, from 1, and its losses.

        Raises:
            DataError: the loss became NaN or infinite; the last checkpoint is kept.
        """
        self.student.train()
        while self.step < self.schedule.steps and not self._is_out_of_patience():
            losses = self._make_step()
            self.step += 1
            self.history.losses.append(losses["loss"])
            tell(self.step, losses)
            if self.step % self.schedule.evaluate == 0 or self.step == self.schedule.steps:
                self._measure()
            if self.step % self.schedule.save == 0 or self.step == self.schedule.steps:
                self.save()
        self._take_best()
        return self.history

    def _make_step(self) -> dict[str, float]:
        import torch

        found: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for batch in self.reading.made(self.step, self.group.device):
            parts = self._losses(batch)
            total = self.objective.total(parts)
            size = batch.size  # batches count by their tokens, as if they were one
            (total * size).backward()
            for name, value in {"loss": total, **parts}.items():
                found[name] = found.get(name, 0) + value.detach() * size
                sizes[name] = sizes.get(name, 0) + size
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                parameter.grad /= sizes["loss"]
        means = torch.stack([value.float() / sizes[name] for name, value in found.items()])
        self.group.average([means])
        losses = dict(zip(found, means.tolist(), strict=True))
        if not math.isfinite(losses["loss"]):
            raise self._diverged(f"the loss became {losses['loss']}")
        self._apply_gradients()
        return losses

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        import torch

        with self._precision():
            teacher = None
            if self.objective.wants_teacher(batch):
                with torch.no_grad():
                    teacher = self.objective.read(self.teacher, batch, teacher=True)
            return self.objective(batch, self.objective.read(self.student, batch), teacher)

    def _precision(self) -> Any:
        import torch

        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.group.device.type, torch.bfloat16)

    def _apply_gradients(self) -> None:
        import torch

        self.group.average(parameter.grad for parameter in self.student.parameters())
        if self.grid is not None:
            self.grid.pull()
        length = torch.nn.utils.clip_grad_norm_(self.learning, self.schedule.clip)
        if not math.isfinite(float(length)):
            raise self._diverged("a gradient became NaN or infinite")
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.grid is not None:
            self.grid.push()

    def _diverged(self, what: str) -> DataError:
        kept = self.step // self.schedule.save * self.schedule.save
        last = f"The checkpoint of step {kept} is kept. " if kept and self.folder is not None else ""
        return DataError(f"step {self.step + 1}: {what}", remedy=f"{last}Try a smaller schedule.rate.")

    def _measure(self) -> None:
        if self.held_out is None:
            return
        loss = self.held_out()
        self.student.train()
        improved = loss < self.history.best
        self.history.held_out.append((self.step, loss))
        if improved and self.schedule.patience:
            self._write(BEST, {"key": self.key, "weights": self._weights()})

    def _is_out_of_patience(self) -> bool:
        return 0 < self.schedule.patience <= self.history.waited()

    def _take_best(self) -> None:
        """Where stopping early is allowed, the best weights are the result."""
        self.group.wait()  # for the first process, which may still be writing them
        if self.schedule.patience and self.history.waited() and self.folder is not None:
            self._load_weights(self._read(BEST)["weights"])

    def _weights(self) -> dict[str, Any]:
        weights: dict[str, Any] = self.student.state_dict() if self.grid is None else self.grid.state()
        return weights

    def _load_weights(self, weights: dict[str, Any]) -> None:
        if self.grid is None:
            self.student.load_state_dict(weights)
        else:
            self.grid.load_state(weights)

    def save(self) -> None:
        """Write a checkpoint, in place of the one before."""

        state = {
            "key": self.key,
            "step": self.step,
            "losses": self.history.losses,
            "held_out": self.history.held_out,
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state(),
        }
        self._write(STATE, state)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if there is one.

        Raises:
            InputError: it is damaged or of another recipe.
        """
        import torch

        if self.folder is None or not (self.folder / STATE).exists():
            return False
        state = self._read(STATE)
        self.step = state["step"]
        self.history = History(list(state["losses"]), [(int(step), loss) for step, loss in state["held_out"]])
        self._load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"][0])
        if self.group.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][1])
        return True

    def _random_state(self) -> list[Tensor]:
        """What dropout draws from: the CPU's generator, and the GPU's where there is one."""
        import torch

        gpu = [torch.cuda.get_rng_state()] if self.group.device.type == "cuda" else []
        return [torch.get_rng_state(), *gpu]

    def _write(self, name: str, state: dict[str, Any]) -> None:
        import torch

        if self.folder is None or not self.group.first:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / name, len(data), overwrite=True) as part:
            part.write_bytes(data)

    def _read(self, name: str) -> dict[str, Any]:
        import torch

        assert self.folder is not None
        path = self.folder / name
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises whatever it met first in a damaged file
            raise InputError(f"checkpoint is damaged: {type(error).__name__}", path=path, remedy="Delete it.") from None
        if state.get("key") != self.key:
            raise InputError(
                "checkpoint is of another recipe",
                path=path,
                remedy="Choose another folder, or delete it to start anew.",
            )
        return state


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout and without gradients."""
    import torch

    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)
