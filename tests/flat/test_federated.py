"""Gossip by hand; a client alone is plain training bit for bit; the sum stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatcompress import flat
from flatcompress.errors import UserError
from flatcompress.flat import federated


def clients(values):
    models = [nn.Linear(1, 1, bias=False) for _ in values]
    for model, value in zip(models, values):
        model.weight.data.fill_(value)
    return models


def held(models):
    return [float(m.weight.detach()) for m in models]


def closure(model, x, y):
    def run():
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return run


def test_one_average_with_the_neighbours_by_hand():
    models = clients([0.0, 3.0, 6.0, 9.0])  # a ring of four: a third of each neighbour and of itself
    federated.gossip(models, federated.gossip_matrix(federated.ring(4)))
    assert held(models) == pytest.approx([4.0, 3.0, 6.0, 5.0])
    assert sum(held(models)) == pytest.approx(18.0)
    models = clients([0.0, 3.0, 6.0, 9.0])
    federated.gossip(models, federated.gossip_matrix(federated.full(4)))
    assert held(models) == pytest.approx([4.5] * 4)
    assert held(clients([1.0])) == [1.0]


def test_several_averages_are_a_power_and_the_gap_says_how_fast_they_mix():
    matrix = federated.gossip_matrix(federated.ring(4))
    once, twice = clients([0.0, 3.0, 6.0, 9.0]), clients([0.0, 3.0, 6.0, 9.0])
    federated.gossip(once, matrix)
    federated.gossip(once, matrix)
    federated.gossip(twice, matrix, 2)
    assert held(once) == pytest.approx(held(twice))
    assert federated.spectral_gap(matrix) == pytest.approx(2 / 3)  # eigenvalues 1, 1/3, 1/3, -1/3
    assert federated.spectral_gap(federated.gossip_matrix(federated.full(5))) == pytest.approx(1.0)


def test_a_round_is_local_sam_steps_and_one_average_by_hand():
    # Loss (w - y)^2 of client i, x = 1: SAM's gradient is 2 (w + rho sign(w - y) - y).
    models = clients([1.0, 3.0])
    optimizers = [flat.create("sam", m, torch.optim.SGD(m.parameters(), lr=0.1), rho=0.5) for m in models]
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    federation = federated.dfedsam(models, optimizers, "full")
    loss = federation.round([[closure(m, x, y)] for m in models])
    local = [1.0 - 0.1 * 2 * 1.5, 3.0 - 0.1 * 2 * 3.5]
    assert held(models) == pytest.approx([sum(local) / 2] * 2) and loss == pytest.approx((1 + 9) / 2)
    assert federation.disagreement == pytest.approx(0.0)


def test_a_client_alone_is_plain_training_bit_for_bit():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    alone = copy.deepcopy(plain)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    first = flat.create("sam", plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    second = flat.create("sam", alone, torch.optim.SGD(alone.parameters(), lr=0.1))
    federation = federated.FEDERATIONS["dfedsam-mgs"]([alone], [second])
    for _ in range(3):
        first.step(closure(plain, x, y))
        federation.round([[closure(alone, x, y)]])
    a, b = plain.state_dict(), alone.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_federations_that_cannot_be_are_refused():
    models = clients([0.0, 1.0])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    with pytest.raises(UserError, match="ring"):
        federated.dfedsam(models, optimizers, "rnig")
    with pytest.raises(UserError, match="sum to 1"):
        federated.Federation(models, optimizers, torch.ones(2, 2))
    with pytest.raises(UserError, match="a row and a column"):
        federated.Federation(models, optimizers[:1], torch.eye(2))
    with pytest.raises(UserError, match="1 lists of closures for 2"):
        federated.dfedsam(models, optimizers).round([[]])
    with pytest.raises(UserError, match="symmetric"):
        federated.gossip_matrix(torch.tensor([[False, True], [False, False]]))
