"""Nested widths: one set of weights, every width the masked full network, any width or mix without training."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_nets import Concat, Grouped, Plain, Residual
from torch import nn

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune import SoftMask, elastic, find_groups, score
from flatcompress.prune.channels import mask_of
from flatcompress.prune.dependency import axes

WIDTHS = [0.25, 0.5, 1.0]


def vit() -> nn.Module:
    return models.build("vit_tiny", num_classes=4, input_shape=(3, 16, 16), seed=0)


NETS = [(Plain, 8), (Residual, 8), (Concat, 8), (Grouped, 8), (vit, 16)]


def made(build=Residual, side: int = 8, widths=WIDTHS):
    torch.manual_seed(0)
    model, x = build(), torch.randn(6, 3, side, side)
    groups = find_groups(model, x)
    return (*elastic.nest(model, groups, elastic.orders_of(groups, score(groups)), widths), x)


def trained(family: elastic.Family, x: torch.Tensor, steps: int = 6) -> elastic.Family:
    optimizer = torch.optim.SGD(family.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        with family.train().at(step % len(family.widths)):
            optimizer.zero_grad()
            (family(x) - 1).square().mean().backward()
            optimizer.step()
    return family.eval()


def masked(family: elastic.Family, plan: Plan, index: int, x: torch.Tensor) -> nn.Module:
    """The full network with everything zero that a width has not, under that width's own statistics."""
    full = copy.deepcopy(family.full)
    groups = find_groups(full, x)
    data = elastic.member_plans(plan.steps[0].data)[index][1].of_kind("channels")[0]
    for name, module in full.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kept = mask_of(data["layers"][name][axes.OUT]) if name in data["layers"] else slice(None)
            own = family.narrower[index].get_submodule(name)
            module.running_mean[kept], module.running_var[kept] = own.running_mean, own.running_var
    SoftMask(groups, elastic.kept_units(groups, family.orders, family.widths[index]))
    return full


@pytest.mark.parametrize(("build", "side"), NETS, ids=lambda v: getattr(v, "__name__", ""))
def test_every_width_is_the_masked_full_network_before_and_after_training(build, side):
    family, plan, x = made(build, side)
    for network in (family.eval(), trained(family, x)):
        for index in range(len(WIDTHS) - 1):
            with network.at(index), torch.no_grad():
                found = network(x)
                assert torch.equal(found, network.network(index)(x))  # what is exported
                assert float((found - masked(network, plan, index, x)(x)).abs().max()) < 1e-6


def test_a_width_gives_gradients_to_its_own_weights_alone():
    """y = w2 relu(w1 x), three hidden units of which 2 and 0 are kept, by hand."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [1.0], [3.0]]))
        model[2].weight.copy_(torch.tensor([[5.0, 7.0, 4.0]]))
    groups = find_groups(model, torch.ones(2, 1))
    family, _ = elastic.nest(model, groups, elastic.orders_of(groups, [torch.tensor([2.0, 1.0, 3.0])]), [2 / 3, 1.0])
    with family.at(0):
        out = family(torch.ones(1, 1))
    out.sum().backward()
    assert out.item() == 2 * 5 + 3 * 4
    assert model[0].weight.grad.flatten().tolist() == [5, 0, 4]
    assert model[2].weight.grad.flatten().tolist() == [2, 0, 3]


def test_one_set_of_weights_and_a_checkpoint_that_is_read_back():
    family, plan, x = made()
    assert [n for n, _ in family.named_parameters()] == [f"full.{n}" for n, _ in Residual().named_parameters()]
    trained(family, x)
    again = apply_plan(Residual(), Plan.from_json(plan.to_json()), x).eval()
    again.load_state_dict(family.state_dict())
    for index in range(3):
        with family.at(index), again.at(index):
            assert torch.equal(family(x), again(x))


def test_a_width_in_between_and_a_mix_are_cut_without_training_and_trained_widths_come_out_as_they_are():
    family, plan, x = made()
    trained(family, x)
    data = plan.steps[0].data

    def cut(width):
        fresh = Residual()
        groups = find_groups(fresh, x)
        keep = elastic.kept_units(groups, data["orders"], width)
        network, steps = elastic.mixed(family, data, fresh, groups, keep, x)
        again = apply_plan(Residual(), steps, x)
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.eval()(x), network.eval()(x))
        return network.eval(), {g.name: int(k.sum()) for g, k in zip(groups, keep)}

    for index, width in enumerate(WIDTHS):
        assert torch.equal(cut(width)[0](x), family.network(index)(x))
    between, counts = cut(0.4)
    assert counts == {"conv1": 3, "conv2": 6, "inner": 5}
    assert between.inner.weight.shape[:2] == (5, 3)
    assert torch.isfinite(between(x)).all()
    assert cut({"inner": 0.25})[1] == {"conv1": 8, "conv2": 16, "inner": 3}
    with pytest.raises(UserError, match="'nothing' is no group"):
        cut({"nothing": 0.5})


@pytest.mark.parametrize("widths", [[0.5], [1.0, 0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 0.51, 1.0]])
def test_widths_that_are_none_are_refused(widths):
    with pytest.raises(UserError, match="width"):
        made(widths=widths)
