"""What training a student takes: tokens, time, memory; and what a scaling law expects of it.

The law is that of Hoffmann et al. (Chinchilla: arXiv:2203.15556, approach 3), fitted to training from labels on web
text. It orders students; it is no forecast of their losses. A student that is cut from its teacher is taken to have
seen 40 times the tokens it reads, which is what Minitron (arXiv:2407.14679) reports to save at most.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguforge.distill import students
from gguforge.distill.footprint import footprint
from gguforge.distill.planning.family import Family
from gguforge.distill.planning.shapes import Shape
from gguforge.quant.errors import InputError, MissingExtraError

TOKENS_PER_WEIGHT = 20  # of a student from random weights
INHERITED = 40  # how much further a token takes a student that is cut
BATCH, CONTEXT = 8, 512  # of the recipe that is written
PROBE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
PROBED_TOKENS, PROBED_STEPS = 256, 3


def expected_loss(weights: int, tokens: float) -> float:
    """Cross-entropy in nats that the law expects of a model without its embeddings.

    >>> round(expected_loss(10**9, 20 * 10**9), 2)
    2.58
    """
    return float(1.69 + 406.4 / weights**0.34 + 410.7 / max(1.0, tokens) ** 0.28)


@dataclass(frozen=True)
class Budget:
    """How much training there may be: tokens, or hours; neither for what is usual.

    Attributes:
        tokens, hours: at most one of them.
        flops: floating-point operations a second of training here; None where unknown.
    """

    tokens: int | None = None
    hours: float | None = None
    flops: float | None = None

    def spent_on(self, shape: Shape, family: Family) -> int:
        """Tokens that a student is trained on."""
        if self.tokens is not None:
            return self.tokens
        if self.hours is not None:
            assert self.flops is not None
            return max(1, int(self.hours * 3600 * self.flops / work(shape, family)))
        return usual_tokens(shape)

    def with_speed(self) -> Budget:
        """The same with the speed of training here, if torch is here to tell."""
        return self if self.flops is not None else replace(self, flops=measured_flops())

    def loss(self, shape: Shape, family: Family) -> float:
        """What the law expects then."""
        return expected_loss(shape.body, self.spent_on(shape, family) * (INHERITED if shape.cut else 1))


def read_budget(text: str | None) -> Budget:
    """A budget in words; hours with the speed of training here, which they are worth nothing without.

    Raises:
        InputError: it is none.
        MissingExtraError: it is in hours, and torch is not there to tell what they are worth.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(h|[kmb]?)", (text or "0").strip().lower())
    if match is None or (text is not None and not float(match[1])):
        raise InputError(f"{text!r} is no budget", expected="hours or tokens, such as 12h or 500M")
    amount = float(match[1])
    if match[2] == "h":
        flops = measured_flops()
        if flops is None:
            raise MissingExtraError("torch", students.EXTRA)
        return Budget(hours=amount, flops=flops)
    return Budget(tokens=int(amount * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]]) or None)


@dataclass(frozen=True)
class Cost:
    """What training one student takes.

    Attributes:
        tokens: that it reads.
        hours: None where no speed was measured.
        memory: bytes of a process.
    """

    tokens: int
    hours: float | None
    memory: int


def usual_tokens(shape: Shape) -> int:
    """20 a weight (Chinchilla), and the fortieth part for a student that is cut."""
    return TOKENS_PER_WEIGHT * shape.body // (INHERITED if shape.cut else 1)


def work(shape: Shape, family: Family) -> int:
    """Floating-point operations for one token: 6 a weight that multiplies, and 2 a weight of a teacher in memory."""
    teacher = family.shape
    read = 2 * (teacher.body + family.vocabulary * teacher.hidden) if family.can_be_cut else 0
    return 6 * (shape.body + family.vocabulary * shape.hidden) + read


def cost(shape: Shape, family: Family, budget: Budget) -> Cost:
    """What training a student takes."""
    tokens = budget.spent_on(shape, family)
    hours = None if budget.flops is None else tokens * work(shape, family) / budget.flops / 3600
    teacher = family.shape.weights(family.vocabulary) if family.can_be_cut else 0
    need = footprint(
        shape.weights(family.vocabulary), family.config_of(shape), BATCH * CONTEXT, teacher_parameters=teacher
    )
    return Cost(tokens, hours, need.total)


def measured_flops() -> float | None:
    """Floating-point operations a second of a training step of a small model here; None without torch."""
    try:
        torch = students.load("torch")
        model = students.fresh_model(PROBE, Path("config.json"), seed=0)
    except MissingExtraError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(1, PROBED_TOKENS, dtype=torch.long, device=device)
    times = [_timed_step(model, optimizer, tokens, torch) for _ in range(PROBED_STEPS + 1)][1:]
    weights = sum(one.numel() for one in model.parameters()) - model.get_input_embeddings().weight.numel()
    return float(6 * weights * PROBED_TOKENS / statistics.median(times))


def _timed_step(model: Any, optimizer: Any, tokens: Any, torch: Any) -> float:
    begun = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
