"""Muon: momentum whose step is made orthogonal, so that every direction of a matrix learns at the same pace.

Keller Jordan 2024 (https://kellerjordan.github.io/posts/muon). It trains the matrices inside a model; embeddings, the
head and vectors are trained by AdamW, as there. Small models learn in about half the steps that AdamW alone needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ADAM_SHARE = 0.15  # AdamW's rate, as a share of Muon's
BETAS, EPSILON = (0.9, 0.95), 1e-8


def orthogonal(update: Tensor) -> Tensor:
    """A matrix with the same directions and all singular values near one, by five Newton-Schulz steps."""
    x = update.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()


def inner_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that Muon trains: all but embeddings and the head."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside.add(id(head.weight))
    return [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in outside]


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon for a model's inner matrices, AdamW for its other parameters.

    Args:
        model: whose parameters are trained.
        rate: the learning rate of the matrices; a group's `lr` may be set before every step. The others learn with
            `ADAM_SHARE` of it.
        weight_decay: of everything but vectors.
    """

    def __init__(self, model: nn.Module, rate: float, weight_decay: float = 0.0) -> None:
        matrices = inner_matrices(model)
        inner = {id(weight) for weight in matrices}
        others = [weight for weight in model.parameters() if id(weight) not in inner]
        groups = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": [weight for weight in others if weight.ndim >= 2], "muon": False, "weight_decay": weight_decay},
            {"params": [weight for weight in others if weight.ndim < 2], "muon": False, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": rate})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: None = None) -> None:
        """One step by the gradients."""
        for group in self.param_groups:
            move = self._move_by_muon if group["muon"] else self._move_by_adam
            for weight in _trained(group["params"]):
                move(weight, self.state[weight], group["lr"], group["weight_decay"])

    @staticmethod
    def _move_by_muon(weight: Tensor, state: dict[str, Any], rate: float, decay: float) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        momentum.lerp_(weight.grad, 1 - MOMENTUM)
        step = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
        weight.mul_(1 - rate * decay)
        weight.add_(step, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)

    @staticmethod
    def _move_by_adam(weight: Tensor, state: dict[str, Any], rate: float, decay: float) -> None:
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        rate *= ADAM_SHARE
        state["step"] = step = state["step"] + 1
        mean, square = state["mean"], state["square"]
        mean.lerp_(weight.grad, 1 - BETAS[0])
        square.lerp_(weight.grad.square(), 1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
        weight.mul_(1 - rate * decay)
        weight.addcdiv_(mean, size, value=-rate / (1 - BETAS[0] ** step))


def _trained(weights: Iterable[Tensor]) -> Iterable[Tensor]:
    return (weight for weight in weights if weight.grad is not None)
