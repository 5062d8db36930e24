"""UDIM by hand: which inputs are worst, what an inconsistency is, and that without it there is SAM."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress import flat
from flatcompress.errors import UserError
from flatcompress.flat.inconsistency import Udim, worst_inputs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 4), torch.arange(8) % 3


def flatness(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rho: float) -> float:
    loss = F.cross_entropy(model(x), y)
    size = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]).norm()
    return float(loss.detach() + rho * size)


def test_inputs_move_along_the_numerical_gradient_of_loss_and_flatness():
    model, (x, y) = net().double().eval(), batch()
    x = x.double()
    found, u = worst_inputs(model, x, y, 0.5, 0.01), torch.zeros_like(x)
    for place in [(0, 0), (3, 2), (7, 1)]:
        high, low = x.clone(), x.clone()
        high[place] += 1e-5
        low[place] -= 1e-5
        u[place] = (flatness(model, high, y, 0.5) - flatness(model, low, y, 0.5)) / 2e-5
    moved = (found - x) / 0.01
    torch.testing.assert_close(moved.norm(dim=0), torch.ones(4, dtype=torch.float64))
    # the direction has length 1 in every column: entries of a column are in the gradient's proportion
    full = torch.zeros_like(x)
    for row in range(8):
        high, low = x.clone(), x.clone()
        high[row, 2] += 1e-5
        low[row, 2] -= 1e-5
        full[row, 2] = (flatness(model, high, y, 0.5) - flatness(model, low, y, 0.5)) / 2e-5
    torch.testing.assert_close(moved[:, 2], full[:, 2] / full[:, 2].norm(), rtol=1e-5, atol=1e-7)
    assert float(u[3, 2]) == pytest.approx(float(full[3, 2]))


def test_a_step_is_sams_gradient_and_that_of_the_inconsistency_by_hand():
    model, (x, y) = net().eval(), batch()
    hand = copy.deepcopy(model)
    udim = Udim(model, torch.optim.SGD(model.parameters(), 0.1), model[3], rho=0.05, move=0.3, lam=0.7)
    udim.step(x, y)
    other = worst_inputs(hand, x, y, 0.05, 0.3)

    def samples(inputs):
        """Every sample's gradient in the last layer, one after the other."""
        rows = []
        for one, label in zip(inputs, y):
            loss = F.cross_entropy(hand(one[None]), label[None])
            rows.append(torch.autograd.grad(loss, [hand[3].weight, hand[3].bias], create_graph=True))
        return torch.stack([r[0].flatten() for r in rows]), torch.stack([r[1] for r in rows])

    own, its = samples(x), samples(other)
    squares, count, norms = 0, 0, 0
    for a, b in zip(own, its):
        v, w = ((g - a.mean(0)).square().mean(0) for g in (a, b))
        middle = (v + w) / 2
        squares = squares + ((v - middle).square().sum() + (w - middle).square().sum()) / 2
        count += v.numel()
        norms = norms + b.square().sum(1).mean() / b.shape[1]
    further = torch.autograd.grad(0.7 * (squares / count + norms), list(hand.parameters()), allow_unused=True)
    loss = F.cross_entropy(hand(x), y)
    grads = torch.autograd.grad(loss, list(hand.parameters()))
    size = torch.cat([g.flatten() for g in grads]).norm()
    near = copy.deepcopy(hand)
    with torch.no_grad():
        for p, g in zip(near.parameters(), grads):
            p.add_(0.05 * g / size)
    sam = torch.autograd.grad(F.cross_entropy(near(x), y), list(near.parameters()))
    for got, before, g, extra in zip(model.parameters(), hand.parameters(), sam, further):
        torch.testing.assert_close(got, before - 0.1 * (g if extra is None else g + extra), rtol=1e-4, atol=1e-6)


def test_without_the_inconsistency_it_is_sam_bit_for_bit_and_statistics_are_sams_with_it():
    (x, y), models = batch(), [net() for _ in range(3)]
    bases = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in models]
    sam = flat.create("sam", models[0], bases[0], rho=0.05)
    others = [Udim(m, b, m[3], lam=lam) for m, b, lam in zip(models[1:], bases[1:], (0.0, 0.5))]
    for step in range(3):

        def closure():
            loss = F.cross_entropy(models[0](x), y)
            loss.backward()
            return loss

        sam.step(closure)
        for udim in others:
            udim.step(x, y)
        if step == 0:
            assert torch.equal(models[0][1].running_mean, models[2][1].running_mean)
    first, second, third = (m.state_dict() for m in models)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not torch.equal(first["0.weight"], third["0.weight"])


def test_what_is_no_head_is_refused():
    model = net()
    with pytest.raises(UserError, match="last linear layer"):
        Udim(model, torch.optim.SGD(model.parameters(), 0.1), nn.Linear(6, 3))
    with pytest.raises(UserError, match="at least 0"):
        Udim(model, torch.optim.SGD(model.parameters(), 0.1), model[3], lam=-1)
    with pytest.raises(UserError, match="called once"):
        Udim(model, torch.optim.SGD(model.parameters(), 0.1), model[0]).step(*batch())
