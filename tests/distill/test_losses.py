"""Every loss against the formula written out in NumPy, and its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gguforge.distill import losses
from gguforge.distill.losses import Entries

torch = pytest.importorskip("torch")

ROWS, VOCABULARY = 5, 11
draw = np.random.default_rng(0)
STUDENT, TEACHER = draw.normal(size=(2, ROWS, VOCABULARY)) * 2
TOKENS = draw.integers(VOCABULARY, size=ROWS)
STATES, TEACHER_STATES = draw.normal(size=(2, ROWS, 8))


def softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(scores / temperature)
    found: np.ndarray = e / e.sum(-1, keepdims=True)
    return found


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(-1).mean())


P, Q = softmax(TEACHER), softmax(STUDENT)
M = 0.3 * P + 0.7 * Q
P2, Q2 = softmax(TEACHER, 2), softmax(STUDENT, 2)

ONLINE: dict[str, tuple[Callable[[Any, Any], Any], float]] = {
    "forward": (losses.forward_kl, kl(P, Q)),
    "forward at 2": (lambda s, t: losses.forward_kl(s, t, temperature=2), 4 * kl(P2, Q2)),
    "reverse": (losses.reverse_kl, kl(Q, P)),
    "reverse at 2": (lambda s, t: losses.reverse_kl(s, t, 2), 4 * kl(Q2, P2)),
    "Jensen-Shannon": (lambda s, t: losses.jensen_shannon(s, t, 0.3), 0.3 * kl(P, M) + 0.7 * kl(Q, M)),
    "skew": (lambda s, t: losses.skew_kl(s, t, 0.1), kl(P, 0.1 * P + 0.9 * Q)),
    "reverse skew": (lambda s, t: losses.skew_kl(s, t, 0.1, reverse=True), kl(Q, 0.1 * Q + 0.9 * P)),
}


def tensor(array: np.ndarray, grad: bool = False) -> Any:
    return torch.tensor(array, requires_grad=grad)


@pytest.mark.parametrize("name", ONLINE)
def test_online_losses_are_their_formulas(name: str) -> None:
    loss, expected = ONLINE[name]
    assert float(loss(tensor(STUDENT), tensor(TEACHER))) == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda s: loss(s, tensor(TEACHER)), tensor(STUDENT, grad=True))


@pytest.mark.parametrize("name", ONLINE)
def test_a_student_like_its_teacher_has_no_loss(name: str) -> None:
    student = tensor(TEACHER, grad=True)
    loss = ONLINE[name][0](student, tensor(TEACHER))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12


def test_cross_entropy() -> None:
    expected = -np.log(Q[np.arange(ROWS), TOKENS]).mean()
    assert float(losses.cross_entropy(tensor(STUDENT), tensor(TOKENS))) == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda s: losses.cross_entropy(s, tensor(TOKENS)), tensor(STUDENT, grad=True))


def whole(p: np.ndarray) -> Entries:
    """All entries of the rows of `p`."""
    rows, ids = np.indices(p.shape)
    return Entries(tensor(rows.ravel()), tensor(ids.ravel()), tensor(p.ravel()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entries_of_a_whole_distribution_give_the_gradient_of_forward_kl(temperature: float) -> None:
    sparse, full = tensor(STUDENT, grad=True), tensor(STUDENT, grad=True)
    p = softmax(TEACHER, temperature)
    loss = losses.sampled_kl(sparse, whole(p), temperature)
    loss.backward()
    losses.forward_kl(full, tensor(TEACHER), temperature).backward()
    torch.testing.assert_close(sparse.grad, full.grad)
    entropy = -(p * np.log(p)).sum(-1).mean()
    q = softmax(STUDENT, temperature)
    assert float(loss.detach()) == pytest.approx(temperature**2 * (kl(p, q) + entropy))


def test_draws_give_that_gradient_on_average() -> None:
    full, mean = tensor(STUDENT, grad=True), torch.zeros(ROWS, VOCABULARY, dtype=torch.float64)
    losses.forward_kl(full, tensor(TEACHER)).backward()
    repeats, draws, generator = 400, 50, np.random.default_rng(3)
    for _ in range(repeats):
        counts = np.stack([generator.multinomial(draws, p) for p in P])
        rows, ids = np.nonzero(counts)
        student = tensor(STUDENT, grad=True)
        losses.sampled_kl(student, Entries(tensor(rows), tensor(ids), tensor(counts[rows, ids] / draws))).backward()
        mean += student.grad / repeats
    spread = np.sqrt(P * (1 - P) / (draws * repeats)) / ROWS
    assert (np.abs((mean - full.grad).numpy()) < 5 * spread).all()


def test_the_tail_is_one_more_outcome() -> None:
    kept = np.argsort(-P, axis=-1)[:, :3]
    rows = np.repeat(np.arange(ROWS), 3)
    inside = np.take_along_axis(P, kept, -1)
    tail = 1 - inside.sum(-1)
    q_tail = 1 - np.take_along_axis(Q, kept, -1).sum(-1)
    expected = -(inside * np.log(np.take_along_axis(Q, kept, -1))).sum(-1) - tail * np.log(q_tail)
    entries = Entries(tensor(rows), tensor(kept.ravel()), tensor(inside.ravel()), tensor(tail))
    assert float(losses.sampled_kl(tensor(STUDENT), entries)) == pytest.approx(expected.mean())
    assert torch.autograd.gradcheck(lambda s: losses.sampled_kl(s, entries), tensor(STUDENT, grad=True))


def test_the_tail_keeps_a_student_that_agrees_where_it_is() -> None:
    kept = np.argsort(-P, axis=-1)[:, :3]
    inside = np.take_along_axis(P, kept, -1)
    rows = np.repeat(np.arange(ROWS), 3)
    student = tensor(TEACHER, grad=True)
    tail = tensor(1 - inside.sum(-1))
    losses.sampled_kl(student, Entries(tensor(rows), tensor(kept.ravel()), tensor(inside.ravel()), tail)).backward()
    assert float(student.grad.abs().max()) < 1e-12


def test_half_precision_scores_are_worked_on_in_float32() -> None:
    scores = tensor(STUDENT).bfloat16()
    loss = losses.forward_kl(scores, tensor(TEACHER).bfloat16())
    assert loss.dtype == torch.float32


def test_hidden_losses() -> None:
    a, b = tensor(STATES), tensor(TEACHER_STATES)
    assert float(losses.hidden_mse(a, b)) == pytest.approx(((STATES - TEACHER_STATES) ** 2).mean())
    lengths = np.linalg.norm(STATES, axis=-1) * np.linalg.norm(TEACHER_STATES, axis=-1)
    cosine = (STATES * TEACHER_STATES).sum(-1) / lengths
    assert float(losses.hidden_cosine(a, b)) == pytest.approx((1 - cosine).mean())
    for loss in (losses.hidden_mse, losses.hidden_cosine):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, b), tensor(STATES, grad=True))


def test_relations_of_models_of_two_widths() -> None:
    heads, length = 2, 4
    narrow, wide = (np.random.default_rng(i).normal(size=(3, length, width)) for i, width in ((1, 6), (2, 10)))
    visible = np.tril(np.ones((length, length), bool))

    def relations(states: np.ndarray) -> np.ndarray:
        found = np.zeros((3, heads, length, length))
        d = states.shape[-1] // heads
        for b, h, i in np.ndindex(3, heads, length):
            part = states[b, :, h * d : (h + 1) * d]
            found[b, h, i, : i + 1] = softmax(part[i] @ part[: i + 1].T / np.sqrt(d))
        return found

    p, q = relations(wide), relations(narrow)
    seen = np.broadcast_to(visible, p.shape)
    expected = (p[seen] * np.log(p[seen] / q[seen])).sum() / (3 * heads * length)
    mask = tensor(visible)
    assert float(losses.relation_kl(tensor(narrow), tensor(wide), heads, mask)) == pytest.approx(expected)
    student = tensor(narrow, grad=True)
    assert torch.autograd.gradcheck(lambda s: losses.relation_kl(s, tensor(wide), heads, mask), student)
