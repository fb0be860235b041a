"""Muon: what it trains, how far a step goes, and that a run goes on from its checkpoint; only where torch is."""

from __future__ import annotations

from copy import deepcopy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (the extra 'train')")

from gguforge.distill.muon import ADAM_SHARE, Muon, inner_matrices, orthogonal  # noqa: E402


class Net(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(8, 16)
        self.inner = torch.nn.Linear(16, 32)
        self.head = torch.nn.Linear(32, 8, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def loss(self) -> torch.Tensor:
        ids = torch.arange(8)
        return torch.nn.functional.cross_entropy(self.head(self.inner(self.embedding(ids)).relu()), ids.flip(0))


def trained(net: Net, optimizer: Muon, steps: int) -> float:
    for _ in range(steps):
        loss = net.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def test_orthogonal_step_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 256), (256, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(rows, columns)))
        assert 0.5 < values.min() <= values.max() < 1.4


def test_embeddings_head_and_vectors_are_not_trained_by_muon() -> None:
    net = Net()
    assert inner_matrices(net) == [net.inner.weight]
    groups = Muon(net, 0.02).param_groups
    assert [group["muon"] for group in groups] == [True, False, False]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_other_parameters_move_as_adamw_moves_them() -> None:
    ours, theirs = Net(), Net()
    optimizer = Muon(ours, 0.02, weight_decay=0.1)
    others = [theirs.embedding.weight, theirs.head.weight]
    adam = torch.optim.AdamW(others, lr=0.02 * ADAM_SHARE, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        ours.loss().backward()
        theirs.inner.load_state_dict(ours.inner.state_dict())
        theirs.loss().backward()
        optimizer.step()
        adam.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    for one, other in zip((ours.embedding.weight, ours.head.weight), others, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_it_learns_and_goes_on_from_its_state() -> None:
    net = Net()
    optimizer = Muon(net, 0.05)
    before = float(net.loss().detach())
    assert trained(net, optimizer, 10) < 0.5 * before
    again = Net()
    again.load_state_dict(net.state_dict())
    taken_up = Muon(again, 0.05)
    taken_up.load_state_dict(deepcopy(optimizer.state_dict()))
    assert trained(net, optimizer, 3) == trained(again, taken_up, 3)
