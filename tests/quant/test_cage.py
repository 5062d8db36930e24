"""CAGE against numbers worked out by hand, and without strength against LSQ bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import quant
from flatcompress.quant.qat.cage import Cage


def layer(weight):
    """A quantized linear layer with 3-bit weights of step 0.5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([weight]))
    quant.quantize(model, 3, 8, example_input=torch.ones(2, len(weight)), first_last_bits=3, per_channel=False)
    found = next(iter(quant.quantized_layers(model).values()))
    found.weight_quant.tensor_quant.set_scale(torch.tensor([0.5]))
    quant.calibrate(model, [torch.ones(2, len(weight))])
    return model, found.weight


def step(model, cage, optimizer, x):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    model(x).sum().backward()
    combined = [p.grad for p in params]
    cage.compose(params, [combined], combined)
    for p, g in zip(params, combined):
        p.grad = g
    optimizer.step()
    cage.after_step({id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]})


@pytest.mark.parametrize("coupled", [False, True])
def test_pull_by_hand(coupled):
    """w = (0.7, -0.9), Q = (0.5, -1), e = (0.2, 0.1); lam_t is 0, 0, 5, 10 in four steps."""
    model, weight = layer([0.7, -0.9])
    start = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.01)
    cage = Cage(model, steps=4, strength=10.0, silence=0.5, coupled=coupled)
    x = torch.zeros(1, 2)  # no gradient of the loss
    for t in range(3):
        step(model, cage, optimizer, x)
        if t < 2:
            assert torch.equal(weight, start)
    torch.testing.assert_close(weight.detach(), start - 0.01 * 5 * torch.tensor([[0.2, 0.1]]))


def test_decoupled_pull_does_not_go_through_adam():
    model, weight = layer([0.7, -0.9])
    start = weight.detach().clone()
    cage = Cage(model, steps=1, strength=10.0, silence=0.0)
    step(model, cage, torch.optim.Adam([weight], lr=0.01), torch.zeros(1, 2))
    torch.testing.assert_close(weight.detach(), start - 0.01 * 10 * torch.tensor([[0.2, 0.1]]))


def test_without_strength_it_is_the_optimizer_bit_for_bit():
    ends = []
    for strength in (0.0, None):
        model, weight = layer([0.7, -0.9, 0.2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if strength is None:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
        else:
            cage = Cage(model, steps=3, strength=strength, silence=0.0)
            for _ in range(3):
                params = list(model.parameters())
                optimizer.zero_grad()
                model(torch.ones(2, 3)).square().sum().backward()
                combined = [p.grad for p in params]
                cage.compose(params, [combined], combined)
                optimizer.step()
                cage.after_step({})
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_a_saved_pull_goes_on_where_it_was():
    model, _ = layer([0.7, -0.9])
    cage = Cage(model, steps=4)
    cage.compose([], [], [])
    cage.compose([], [], [])
    other = Cage(model, steps=4)
    other.load_state_dict(cage.state_dict())
    assert other.weight == cage.weight == 5.0
    with pytest.raises(ValueError, match="silence"):
        Cage(model, steps=4, silence=1.0)
