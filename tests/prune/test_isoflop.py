"""Sparse-IFT by hand: what a weight is made of, what it costs, and that nothing of it is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatcompress.errors import UserError
from flatcompress.prune import isoflop


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )  # fmt: skip


def step(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()(x)


def test_a_doped_weight_by_hand_and_folded():
    model = net()
    assert isoflop.sparse_doped(model, 0.5) == ["0", "5"]
    form = model[0].parametrizations["weight"][0]
    original = model[0].parametrizations["weight"].original
    # 8 x 27 numbers, half of them zero; r = floor(0.5 * 216 / 35) = 3 factors of 35 numbers make up for 108
    assert form.u.shape == (3, 27) and form.v.shape == (8, 3) and int(form.mask.sum()) == 108
    byhand = original * form.mask + torch.einsum("or,rk->ok", form.v, form.u).view(8, 3, 3, 3)
    torch.testing.assert_close(model[0].weight, byhand)
    trained = step(model)
    names = set(net().state_dict())
    folded = isoflop.fold(model)
    torch.manual_seed(1)
    torch.testing.assert_close(folded(torch.randn(4, 3, 6, 6)), trained)
    assert set(folded.state_dict()) == names and bool((folded[0].weight != 0).all())


@pytest.mark.parametrize("form", [isoflop.sparse_doped, isoflop.sparse_wide])
def test_without_sparsity_training_is_what_it_was_bit_for_bit(form):
    plain, other = net(), net()
    form(other, 0.0)
    assert torch.equal(step(plain), step(other))
    assert all(torch.equal(v, isoflop.fold(other).state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.9])
def test_the_work_is_that_of_the_dense_layer(sparsity):
    layer = nn.Sequential(nn.Linear(40, 30))
    isoflop.sparse_doped(layer, sparsity)
    form = layer[0].parametrizations["weight"][0]
    used = int(form.mask.sum()) + form.u.numel() + form.v.numel()
    assert 1200 - 70 <= used <= 1201
    wide = isoflop.wider(40, sparsity)
    assert (1 - sparsity) * wide**2 == pytest.approx(1600, rel=0.04)


def test_masks_hold_follow_the_seed_and_stay_as_zeros():
    a, b, c = (copy.deepcopy(net()) for _ in range(3))
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        isoflop.sparse_wide(model, 0.75, seed, ignore=["5"])
    masks = [m[0].parametrizations["weight"][0].mask for m in (a, b, c)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    step(a)
    assert torch.equal(isoflop.fold(a)[0].weight == 0, masks[0] == 0) and int(masks[0].sum()) == 54


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="below 1"):
        isoflop.sparse_doped(net(), 1.0)
    with pytest.raises(UserError, match="no convolution"):
        isoflop.sparse_wide(nn.ReLU(), 0.5)
    with pytest.raises(UserError, match="conv9"):
        isoflop.sparse_wide(net(), 0.5, ignore=["conv9"])
