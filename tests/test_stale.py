"""An optimizer that was made before its model changed is told so; it never trains nothing in silence."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress import apply_plan, flat, prune, quant
from flatcompress.errors import UserError

X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)


def quantized(model: nn.Module) -> None:
    quant.quantize(model, 4, 4, example_input=X)
    quant.calibrate(model, [X])


def repeated(model: nn.Module) -> None:
    apply_plan(model, prune.prune(net(), X, ratio=0.5))


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
    "sam": lambda m: flat.create("sam", m, torch.optim.SGD(m.parameters(), lr=0.1), rho=0.05),
    "none": lambda m: flat.create("none", m, torch.optim.AdamW(m.parameters())),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("cut", [lambda m: prune.prune(m, X, ratio=0.5), repeated])
def test_an_optimizer_from_before_a_cut_is_refused_at_its_next_step(make: str, cut) -> None:
    model = net()
    optimizer = OPTIMIZERS[make](model)
    step(model, optimizer)
    cut(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"was made before the model was pruned: \d of its 6 parameters"):
        step(model, optimizer)
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if "running" not in k and "num" not in k
    )
    step(model, OPTIMIZERS[make](model))


@pytest.mark.parametrize("make", ["sam", "none"])
def test_a_flat_optimizer_from_before_quantize_is_refused(make: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[make](model)
    quantized(model)
    with pytest.raises(UserError, match=r"trainable parameters that it did not have when this optimizer was made"):
        step(model, optimizer)


def test_a_plain_optimizer_from_before_quantize_warns_once() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model)
    quantized(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4):
            step(model, optimizer)
    assert any("no optimizer holds 2 of their learned scales" in str(w.message) for w in seen)
    assert len([w for w in seen if "learned scales" in str(w.message)]) == 1


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    scales = {id(p) for p in quant.scale_parameters(model).values()}
    weights = [p for p in model.parameters() if id(p) not in scales]
    return [torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(quant.scale_parameters(model).values(), lr=0.01)]


def frozen_scales(model: nn.Module) -> list[torch.optim.Optimizer]:
    for scale in quant.scale_parameters(model).values():
        scale.requires_grad_(False)
    return [torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)]


@pytest.mark.parametrize("make", [lambda m: [OPTIMIZERS[k](m) for k in ("sgd", "sam")], two_optimizers, frozen_scales])
def test_optimizers_made_after_quantize_pass_in_silence(make) -> None:
    model = net()
    quantized(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for optimizer in make(model):
                step(model, optimizer)


def test_new_parameters_that_are_added_or_frozen_or_were_left_out_on_purpose_are_no_reason() -> None:
    model = net()
    head = flat.create("sam", model, torch.optim.SGD(model[5].parameters(), lr=0.1), rho=0.05)
    step(model, head)  # the rest is left out on purpose
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    step(model, head)
    model.add_module("6", nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"first: 6\.weight"):
        step(model, head)
    head.add_param_group({"params": list(model[6].parameters())})
    step(model, head)


def test_a_copy_of_a_model_with_its_optimizer_goes_on_by_itself() -> None:
    model = net()
    optimizer = OPTIMIZERS["sam"](model)
    other, twin = copy.deepcopy((model, optimizer))
    prune.prune(model, X, ratio=0.5)
    step(other, twin)
