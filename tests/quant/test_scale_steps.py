"""Scales move by shares of their size, and by turns."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from nets import Net, trained
from torch import nn

from flatcompress import flat, quant
from flatcompress.errors import UserError

torch.set_num_threads(1)
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
Y = torch.arange(16) % 4
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW
}  # fmt: skip


def net(method: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    model = trained(Net(final=False), 5)
    quant.quantize(model, 3, 3, method=method)
    quant.calibrate(model, [X])
    return model.eval()


def loss(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def groups(model: nn.Module, scales: list[nn.Parameter], lr: float) -> list[dict]:
    own = {id(p) for p in scales}
    rest = [p for p in model.parameters() if id(p) not in own]
    return [{"params": rest, "weight_decay": 0.0}, {"params": scales, "lr": lr, "weight_decay": 0.0}]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, changes: list, steps: int) -> None:
    def compose(params, probes, combined):
        for change in changes:
            change.compose(params, probes, combined)

    taking = flat.create("none", model, optimizer, compose=compose)

    def closure() -> torch.Tensor:
        found = loss(model)
        found.backward()
        return found

    for _ in range(steps):
        taking.step(closure)
        for change in changes:
            if isinstance(change, quant.RelativeSteps):
                change.after_step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_relative_steps_train_the_logarithm_of_a_scale(name: str) -> None:
    """Against a loop that holds sigma = log s as the parameter."""
    model, other = net(), net()
    scales = list(quant.scale_parameters(model).values())
    stepped(model, OPTIMIZERS[name](groups(model, scales, 0.01), lr=1e-3), [quant.RelativeSteps(model)], 4)

    theirs = list(quant.scale_parameters(other).values())
    logs = [nn.Parameter(p.detach().double().log()) for p in theirs]
    optimizer = OPTIMIZERS[name](groups(other, theirs, 0.0)[:1] + groups(other, logs, 0.01)[1:], lr=1e-3)
    for _ in range(4):
        other.zero_grad()
        loss(other).backward()
        for sigma, scale in zip(logs, theirs):
            sigma.grad = (scale.detach() * scale.grad).double()
        optimizer.step()
        with torch.no_grad():
            for sigma, scale in zip(logs, theirs):
                scale.copy_(sigma.exp())
    for mine, sigma in zip(scales, logs):
        torch.testing.assert_close(mine.detach().double().log(), sigma.detach(), atol=3e-5, rtol=0)
    assert any(not torch.equal(a, b.initial) for a, b in zip(scales, quant.tensor_quantizers(model).values()))


def test_under_adam_scales_of_every_size_move_by_the_same_share() -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in quant.scale_parameters(model).items()}
    scales = list(quant.scale_parameters(model).values())
    adam = torch.optim.Adam(groups(model, scales, 0.01), lr=1e-3, eps=1e-15)
    stepped(model, adam, [quant.RelativeSteps(model)], 1)
    moved = torch.cat(
        [(p.detach() / before[n]).log().abs().flatten() for n, p in quant.scale_parameters(model).items()]
    )
    reached = moved[moved > 1e-6]  # a channel that nothing passes has no gradient
    assert len(reached) > 10 and float((reached - 0.01).abs().max()) < 2e-4
    assert max(float(v.max()) for v in before.values()) > 5 * min(float(v.min()) for v in before.values())


def test_an_offset_moves_in_units_of_its_scale() -> None:
    model = net("lsq+")
    scales = quant.scale_parameters(model)
    name = next(n for n in scales if n.endswith(".beta"))
    unit, before = scales[name.removesuffix(".beta")].detach().clone(), scales[name].detach().clone()
    adam = torch.optim.Adam(groups(model, list(scales.values()), 0.01), lr=1e-3, eps=1e-15)
    stepped(model, adam, [quant.RelativeSteps(model)], 1)
    assert math.isclose(abs(float((scales[name].detach() - before) / unit)), 0.01, rel_tol=0.02)


def test_a_scale_stays_positive_however_large_the_step() -> None:
    model = net()
    scales = list(quant.scale_parameters(model).values())
    stepped(model, torch.optim.SGD(groups(model, scales, 50.0), lr=1e-3), [quant.RelativeSteps(model)], 1)
    assert all(bool((p > 0).all()) for p in scales)


def test_quantizers_without_a_step_are_refused() -> None:
    with pytest.raises(UserError, match="take absolute steps"):
        quant.RelativeSteps(net("brevitas"))


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> tuple[bool, bool]:
    """Whether weights, and scales, have moved."""
    names = quant.scale_names(model)
    changed = {n: not torch.equal(p, before[n]) for n, p in model.named_parameters()}
    return any(v for n, v in changed.items() if n not in names), any(v for n, v in changed.items() if n in names)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"warm_up": 0.25}, "s s b b b b b b"), ({"stop": 0.0}, "w w w w w w w w"), ({"stop": 0.5}, "b b b b w w w w"),
        ({"every": 2}, "w w s s w w s s"), ({"warm_up": 0.25, "every": 1, "stop": 0.75}, "s s w s w s w w"),
        ({}, "b " * 8),
    ],
)  # fmt: skip
def test_what_waits_does_not_move(keys: dict, expected: str) -> None:
    model = net()
    turns = quant.ScaleTurns(model, 8, **keys)
    optimizer = torch.optim.Adam(groups(model, list(quant.scale_parameters(model).values()), 1e-4), lr=1e-3)
    found = []
    for _ in range(8):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        stepped(model, optimizer, [turns], 1)
        found.append({(True, True): "b", (True, False): "w", (False, True): "s"}[moved(model, before)])
    assert found == expected.split()


def test_turns_go_on_after_an_interruption() -> None:
    model = net()
    turns = quant.ScaleTurns(model, 8, every=2)
    turns.t = 3
    again = quant.ScaleTurns(copy.deepcopy(model), 8, every=2)
    again.load_state_dict(turns.state_dict())
    assert again.moving == turns.moving == (False, True)
