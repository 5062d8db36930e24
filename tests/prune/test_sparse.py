"""Regularisation baselines: exactly what each adds to the gradients."""

from __future__ import annotations

import pytest
import torch
from prune_nets import images, net
from torch import nn

from flatcompress.errors import UserError
from flatcompress.prune import find_groups
from flatcompress.prune.importance import group_l2
from flatcompress.prune.regularizers import group_norm_, growing_, growing_strength, mask_sparsity_


def with_gradients(name: str = "plain") -> tuple[nn.Module, list, dict[str, torch.Tensor]]:
    model = net(name)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model, find_groups(model, images()), {n: p.grad.clone() for n, p in model.named_parameters()}


def added(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: p.grad - before[n] for n, p in model.named_parameters()}


def test_mask_sparsity_adds_the_sign_of_gamma_on_channels_to_prune_only() -> None:
    model, groups, before = with_gradients()
    with torch.no_grad():
        model.bn1.weight[0] = -1.0
    keep = [torch.arange(8) >= 3, torch.ones(16, dtype=torch.bool)]
    mask_sparsity_(groups, keep, factor=0.25)
    found = added(model, before)
    assert found["bn1.weight"].tolist() == [-0.25, 0.25, 0.25, 0, 0, 0, 0, 0]
    assert all(not change.any() for name, change in found.items() if name != "bn1.weight")


def test_mask_sparsity_without_a_norm_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    groups = find_groups(model, images())
    with pytest.raises(UserError, match="BatchNorm"):
        mask_sparsity_(groups, [torch.zeros(4, dtype=torch.bool)])


def test_group_norm_shrinks_the_least_important_unit_most() -> None:
    model, groups, before = with_gradients()
    importance = group_l2(groups[0]).sqrt()
    group_norm_(groups, strength=0.01)
    share = added(model, before)["bn1.weight"] / model.bn1.weight.detach()
    torch.testing.assert_close(share[importance.argmin()], torch.tensor(0.16))
    torch.testing.assert_close(share[importance.argmax()], torch.tensor(0.01))
    assert torch.equal(share.argsort(), importance.argsort(descending=True))
    assert not added(model, before)["fc.bias"].any()


def test_group_norm_reaches_the_slices_of_producer_and_consumer() -> None:
    model, groups, before = with_gradients()
    importance = group_l2(groups[0]).sqrt()
    gamma = 2 ** (4 * (importance.max() - importance) / (importance.max() - importance.min()))
    group_norm_(groups[:1], strength=0.01)
    found = added(model, before)
    torch.testing.assert_close(found["conv1.weight"], 0.01 * gamma.view(-1, 1, 1, 1) * model.conv1.weight.detach())
    torch.testing.assert_close(found["conv2.weight"], 0.01 * gamma.view(1, -1, 1, 1) * model.conv2.weight.detach())


def test_growing_penalty_acts_on_dropped_units_only() -> None:
    model, groups, before = with_gradients()
    keep = [torch.arange(8) >= 2, torch.ones(16, dtype=torch.bool)]
    growing_(groups, keep, strength=0.1)
    found = added(model, before)
    torch.testing.assert_close(found["conv1.weight"][:2], 0.1 * model.conv1.weight.detach()[:2])
    torch.testing.assert_close(found["conv2.weight"][:, :2], 0.1 * model.conv2.weight.detach()[:, :2])
    assert not found["conv1.weight"][2:].any() and not found["conv2.weight"][:, 2:].any()


def test_growing_strength_climbs_in_steps_to_its_ceiling() -> None:
    found = [growing_strength(s, growth=0.1, every=2, ceiling=0.25) for s in range(8)]
    assert found == [0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25, 0.25]


def test_penalised_units_shrink_under_plain_sgd() -> None:
    model = net("plain")
    groups = find_groups(model, images())
    keep = [torch.arange(8) >= 4, torch.ones(16, dtype=torch.bool)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = group_l2(groups[0])
    for step in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images()), torch.tensor([0, 1, 2])).backward()
        growing_(groups, keep, growing_strength(step, growth=0.1, every=1))
        optimizer.step()
    left = group_l2(groups[0]) / start
    assert left[:4].max() < 0.1 < left[4:].min()


def test_frozen_layers_are_left_alone() -> None:
    model, groups, _ = with_gradients()
    model.conv1.weight.grad = None
    group_norm_(groups)
    assert model.conv1.weight.grad is None
