"""What a student is trained by: distances between its scores and a teacher's, or its states and a teacher's.

Scores (logits) are rows of shape (R, V), one for every token that counts, already matched: which position predicts
which token is settled where the targets are made. Every loss is a mean over rows, in nats. Offline there are only some
entries of each of the teacher's rows (`Entries`); the losses that need all of them are for a teacher in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entries:
    """Some entries of a teacher's R distributions.

    Attributes:
        row: the row of each entry, shape (E,), int64.
        ids: token ids, shape (E,), int64.
        weights: probabilities, shape (E,), float32.
        tail: probability that the entries of a row leave out, shape (R,); None when they leave out none or are drawn.
    """

    row: Tensor
    ids: Tensor
    weights: Tensor
    tail: Tensor | None = None


def cross_entropy(scores: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens that really came, shape (R,)."""
    return -log_probabilities(scores).gather(-1, tokens[:, None]).mean()


def log_probabilities(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithms of softmax(scores / temperature), in float32 at least, shape (R, V)."""
    scores = scores.float() if scores.element_size() < 4 else scores
    return (scores / temperature).log_softmax(-1)


def sampled_kl(scores: Tensor, entries: Entries, temperature: float = 1.0) -> Tensor:
    """Forward KL from drawn targets, up to the teacher's entropy: mean of -sum(weight * log q).

    Where weights are counts / draws, its gradient is on average that of the whole distribution (arXiv:2503.16870). With
    a tail, what the entries leave out is one more outcome, whose probability the student gives to all other tokens.

    Args:
        temperature: that of the targets; the scores are divided by it, the loss multiplied with its square.
    """
    log_q = log_probabilities(scores, temperature)
    chosen = log_q[entries.row, entries.ids]
    total = -(entries.weights * chosen).sum()
    if entries.tail is not None:
        kept = chosen.new_zeros(len(scores)).index_add(0, entries.row, chosen.exp())
        smallest = 1e-7 if chosen.element_size() < 8 else 1e-15
        total = total - (entries.tail * (1 - kept).clamp(min=smallest).log()).sum()
    return total / len(scores) * temperature**2


def forward_kl(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of whole distributions, p the teacher's; spreads the student over all that the teacher allows."""
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(scores, temperature)
    return _divergence(log_p, log_q) * temperature**2


def reverse_kl(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p): keeps the student from what the teacher rules out (MiniLLM: arXiv:2306.08543)."""
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(scores, temperature)
    return _divergence(log_q, log_p) * temperature**2


def jensen_shannon(scores: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalized Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    GKD (arXiv:2306.13649), equation 1; beta lies strictly between 0 and 1.
    """
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(scores, temperature)
    log_m = _mixture(log_p, log_q, beta)
    return (beta * _divergence(log_p, log_m) + (1 - beta) * _divergence(log_q, log_m)) * temperature**2


def skew_kl(
    scores: Tensor, teacher: Tensor, skew: float = 0.1, reverse: bool = False, temperature: float = 1.0
) -> Tensor:
    """KL(p || skew p + (1 - skew) q), or, reverse, KL(q || skew q + (1 - skew) p): gradients that cannot explode.

    DistiLLM (arXiv:2402.03898); 0 < skew < 1.
    """
    log_p, log_q = log_probabilities(teacher, temperature), log_probabilities(scores, temperature)
    near, far = (log_q, log_p) if reverse else (log_p, log_q)
    return _divergence(near, _mixture(near, far, skew)) * temperature**2


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), shape (R, V)."""
    return (log_p + math.log(share)).logaddexp(log_q + math.log1p(-share))


def hidden_mse(states: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two layers' states, shape (R, width) each."""
    return (states - teacher).square().mean()


def hidden_cosine(states: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of two layers' states, shape (R, width) each, as DistilBERT's third loss."""
    lengths = (states.square().sum(-1) * teacher.square().sum(-1)).clamp(min=1e-16).sqrt()
    return (1 - (states * teacher).sum(-1) / lengths).mean()


def embedding_relation(embeddings: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two models' similarities of a batch's texts, each with each; widths may differ.

    Args:
        embeddings, teacher: shape (batch, width), of length 1; one alone is related to nothing.
    """
    ours, theirs = embeddings @ embeddings.T, teacher @ teacher.T
    count = len(ours)
    return (ours - theirs).square().sum() / max(1, count * (count - 1))  # the diagonals are equal


def relation_kl(states: Tensor, teacher: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Forward KL between how two models relate the positions of a text to each other (MiniLMv2: arXiv:2012.15828).

    The relations are softmax(states states' / sqrt(d)) in each of `heads` slices of d numbers. Widths may differ, so
    that no projection has to be learned; queries, keys and values are all used that way.

    Args:
        states, teacher: shape (batch, length, width), widths multiples of `heads`.
        visible: which positions relate to which, shape broadcasting to (batch, heads, length, length), bool; every
            position sees itself.
    """
    log_p, log_q = _relations(teacher, heads, visible), _relations(states, heads, visible)
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(~visible, 0)
    return terms.sum(-1).mean()


def _relations(states: Tensor, heads: int, visible: Tensor) -> Tensor:
    batch, length, width = states.shape
    parts = states.float() if states.element_size() < 4 else states
    parts = parts.reshape(batch, length, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / math.sqrt(width // heads)
    return scores.masked_fill(~visible, -1e9).log_softmax(-1)
