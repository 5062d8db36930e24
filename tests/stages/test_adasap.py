"""AdaSAP (arXiv 2306.14306) as the stage puts it together: the room's radii in the flat engine's ball.

Radii alone (monotone, affine invariant, shared by coupled layers) are tested in tests/prune/test_radius.py, the
removal schedule in tests/prune/test_gradual.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from stage_pieces import SHAPE, config, context
from torch import Tensor, nn

from flatcompress import flat
from flatcompress.prune import adaptive_radius, find_groups, score
from flatcompress.stages import prune, run_stage

TWO = Tensor([[3.0, 4.0], [0.0, 1.0]])


class Linear(nn.Module):
    """A loss that is linear in its weight: its gradient is ``gradient`` everywhere."""

    def __init__(self, weight: Tensor, gradient: Tensor) -> None:
        super().__init__()
        self.weight, self.gradient = nn.Parameter(weight.clone()), gradient

    def forward(self) -> Tensor:
        return (self.weight * self.gradient).sum()


def perturbed(model: nn.Module, name: str, loss=None, **options) -> tuple[list[Tensor], list[float]]:
    """The perturbation of every parameter in one step of ``name``, and the losses of its two passes."""
    seen, losses = [], []
    optimizer = flat.create(name, model, torch.optim.SGD(model.parameters(), 0.0), **options)

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        value = (loss or model)()
        value.backward()
        losses.append(value.item())
        return value

    optimizer.step(closure)
    return [after - before for before, after in zip(*seen, strict=True)], losses


def test_published_size_of_an_asam_step() -> None:
    (eps,), _ = perturbed(Linear(Tensor([3.0, 1.0]), Tensor([3.0, 4.0])), "asam", rho=0.5, eta=0.0)
    torch.testing.assert_close(eps, Tensor([1.370717, 0.203069]), rtol=0, atol=1e-6)
    torch.testing.assert_close((eps / Tensor([3.0, 1.0])).norm(), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [("per_row", [[1.2, 1.6], [0.0, 0.01]]), ("selected", [[1.176697, 1.568929], [0.0, 0.001961]])],
)
def test_two_neurons_with_radii_of_their_own(scope: str, wanted: list) -> None:
    radius = Tensor([2.0, 0.01])
    (eps,), _ = perturbed(Linear(torch.ones(2, 2), TWO), "sam", radius=lambda params: [radius], scope=scope)
    torch.testing.assert_close(eps, Tensor(wanted), rtol=0, atol=2e-6)


def neurons(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    gradient[2] = 0
    return weight, gradient, torch.tensor([2.0, 0.5, 1.0, 0.01])


def test_every_neuron_moves_by_its_own_radius_and_one_without_gradient_not_at_all() -> None:
    weight, gradient, radius = neurons()
    model = Linear(weight, gradient)
    (eps,), _ = perturbed(model, "asam", eta=0.01, radius=lambda params: [radius], scope="per_row")
    sizes = (eps / (weight.abs() + 0.01)).norm(dim=1)
    torch.testing.assert_close(sizes, torch.tensor([2.0, 0.5, 0.0, 0.01]), rtol=1e-4, atol=1e-5)
    assert not eps[2].any()


def test_no_perturbation_within_the_radii_raises_a_linear_loss_more() -> None:
    weight, gradient, radius = neurons()
    metric = weight.abs() + 0.01
    model = Linear(weight, gradient)
    _, losses = perturbed(model, "asam", eta=0.01, radius=lambda params: [radius], scope="per_row")
    rise = losses[1] - losses[0]
    assert rise == pytest.approx(float((radius * (metric * gradient).norm(dim=1)).sum()), rel=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        feasible = metric * nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1) * radius[:, None]
        assert float((feasible * gradient).sum()) < rise


def test_scale_of_one_layer_against_the_next_does_not_matter() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randn(8, 2)

    def net(factor: float) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer, scale in ((model[0], factor), (model[2], 1 / factor)):
                layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
        return model

    rises = []
    for factor in (1.0, 8.0):
        model = net(factor)
        radius = [torch.linspace(0.1, 0.5, 5), torch.linspace(0.2, 0.3, 2)]
        loss = lambda model=model: nn.functional.mse_loss(model(x), y)  # noqa: E731
        _, losses = perturbed(model, "asam", loss, eta=0.0, radius=lambda params, r=radius: r)
        rises.append(losses)
    torch.testing.assert_close(torch.tensor(rises[1]), torch.tensor(rises[0]), rtol=1e-4, atol=1e-5)


# --- on a network with its groups


def steps(model: nn.Module, name: str, count: int = 2, **options) -> nn.Module:
    """``model`` after ``count`` steps of ``name`` on one batch."""
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(3))
    y = torch.arange(8) % 4
    optimizer = flat.create(name, model.train(), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), **options)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return model


def radius_of(model: nn.Module, low: float, high: float):
    groups = find_groups(model, torch.zeros(1, *SHAPE))
    return lambda params: adaptive_radius(groups, score(groups), params, low, high)


@pytest.mark.parametrize(("name", "geometry"), [("asam", {}), ("sam", {}), ("asam", {"geometry": "plain"})])
def test_equal_radii_are_the_uniform_method(name: str, geometry: dict) -> None:
    model = context().model
    uniform, adaptive = copy.deepcopy(model), copy.deepcopy(model)
    steps(uniform, name, rho=0.3, **geometry)
    steps(adaptive, name, radius=radius_of(adaptive, 0.3, 0.3), **geometry)
    for key, value in uniform.state_dict().items():
        torch.testing.assert_close(adaptive.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_radii_of_zero_are_the_plain_optimizer() -> None:
    model = context().model
    plain, adaptive = copy.deepcopy(model), copy.deepcopy(model)
    steps(plain, "none")
    steps(adaptive, "asam", radius=radius_of(adaptive, 0.0, 0.0))
    assert all(torch.equal(value, adaptive.state_dict()[key]) for key, value in plain.state_dict().items())


def test_running_statistics_are_those_of_the_first_pass() -> None:
    model = context().model
    plain, adaptive = copy.deepcopy(model), copy.deepcopy(model)
    steps(plain, "none", count=1)
    steps(adaptive, "asam", count=1, radius=radius_of(adaptive, 0.01, 2.0))
    statistics = [key for key in plain.state_dict() if "running" in key or "tracked" in key]
    assert statistics and all(torch.equal(plain.state_dict()[k], adaptive.state_dict()[k]) for k in statistics)


@pytest.mark.parametrize("norm", ["global", "per_neuron"])
def test_removed_channels_are_zero_in_every_pass_whatever_momentum_and_decay_do(norm: str, monkeypatch) -> None:
    work, found, seen = context(), [], []

    class Watched(prune.Removal):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            found.append(self)

    def look(module: nn.Module, inputs: object) -> None:
        if module.training and found and found[0].event:
            seen.append(float(sum(removed(found[0]))))

    monkeypatch.setattr(prune, "Removal", Watched)
    work.model.register_forward_pre_hook(look)
    keys = {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.1}, "schedule_steps": 2, "epochs": 4}
    run_stage("prune", work, config("prune", method="adasap", norm=norm, warmup_share=0.1, prune_share=0.4, **keys))
    assert len(seen) >= 8 and not any(seen)  # two passes a step


@pytest.mark.parametrize("norm", ["global", "per_neuron"])
def test_step_3_is_asam_at_rho_max_whatever_the_norm_of_steps_1_and_2(norm: str, monkeypatch) -> None:
    made, make = [], prune.make_job

    def watched(*arguments, **keys):
        made.append(keys)
        return make(*arguments, **keys)

    monkeypatch.setattr(prune, "make_job", watched)
    run_stage("prune", context(), config("prune", method="adasap", norm=norm, rho_max=0.5, epochs=3))
    first, last = made
    assert ("scope" in first["hyper"]) == (norm == "per_neuron") and "radius" in first
    assert last["hyper"] == {"rho": 0.5} and "radius" not in last


def removed(removal: prune.Removal) -> list[Tensor]:
    return [
        m.module.weight[~m.spread(keep, True)].abs().sum()
        for group, keep in zip(removal.groups, removal.mask.keep, strict=True)
        for m in group.outs
        if m.module.weight.shape[0] == len(m.owner)  # afterwards the groups are spent
    ]
