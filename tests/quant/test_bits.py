from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, trained
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.quant.sensitivity import rounding_error

torch.set_num_threads(1)
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
Y = torch.arange(16) % 4


def loss_of(model: nn.Module):
    return lambda: nn.functional.cross_entropy(model(X), Y)


class Quadratic(nn.Module):
    """L = sum h w^2 / 2 on one linear layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)
        self.h = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.h * self.fc.weight.square()).sum()


def test_one_sample_is_exact_on_a_diagonal_quadratic() -> None:
    model = Quadratic()
    for seed in range(3):
        assert quant.hessian_traces(model, model, samples=1, seed=seed)["fc"] == pytest.approx(21.0, rel=1e-5)


def test_trace_estimate_approaches_the_exact_trace() -> None:
    torch.manual_seed(0)
    model = trained(Net(width=3), 5).double().eval()
    weight = model.fc.weight
    x = X.double()
    loss = nn.functional.cross_entropy(model(x), Y)
    (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    exact = sum(
        float(torch.autograd.grad(gi, weight, retain_graph=True)[0].flatten()[i]) for i, gi in enumerate(g.flatten())
    )
    found = quant.hessian_traces(model, lambda: nn.functional.cross_entropy(model(x), Y), ["fc"], samples=200)["fc"]
    assert found == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("kind", ["measured", "hessian", "gradient"])
def test_sensitivity_never_rises_in_bits_and_leaves_the_model_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = trained(Net(), 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = quant.sensitivities(model, loss_of(model), kind=kind)
    assert list(table) == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for costs in table.values():
        values = [costs[b] for b in (2, 3, 4, 6, 8)]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] >= 0
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None or k for k, p in model.named_parameters())


def test_gradient_sensitivity_is_the_fisher_form() -> None:
    model = Quadratic()
    table = quant.sensitivities(model, model, kind="gradient", choices=[3])
    expected = ((model.h * model.fc.weight).square() * rounding_error(model.fc.weight, 3).square()).sum()
    assert table["fc"][3] == pytest.approx(expected.item(), rel=1e-5)


def test_measured_sensitivity_is_the_loss_with_one_layer_rounded() -> None:
    model = Quadratic()
    expected = 0.5 * (model.h * (model.fc.weight + rounding_error(model.fc.weight, 3)).square()).sum() - model()
    rise = quant.rounded_loss(model, model, {"fc": 3}) - quant.rounded_loss(model, model, {})
    assert rise == pytest.approx(expected.item(), rel=1e-5)
    assert quant.sensitivities(model, model, choices=[3])["fc"][3] == pytest.approx(abs(expected.item()), rel=1e-5)


class TwoLayers(nn.Module):
    """Layers of one size; the loss is what a move away from the start costs, ``heavier`` times in the second one."""

    def __init__(self, heavier: float) -> None:
        super().__init__()
        layers = [nn.Linear(16, 16, bias=False) for _ in range(4)]  # of which the first and last have fixed bits
        self.start = [layer.weight.detach().clone() for layer in layers]
        self.layers, self.heavier = nn.Sequential(*layers), heavier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def loss(self) -> torch.Tensor:
        moved = [(layer.weight - start).square().sum() for layer, start in zip(self.layers, self.start)]
        return moved[1] + self.heavier * moved[2]


@pytest.mark.parametrize("heavier", [1.5, 1000.0])
def test_measured_bits_differ_only_where_the_loss_rises_less_than_with_uniform_ones(heavier: float) -> None:
    torch.manual_seed(0)
    model = TwoLayers(heavier)
    bits = quant.auto_bits(model, model.loss, 4.0, example_input=torch.randn(2, 16))
    if heavier < 2:
        assert bits == {"layers.1": 4, "layers.2": 4}
    else:
        assert bits == {"layers.1": 2, "layers.2": 6}
        uniform = dict.fromkeys(bits, 4)
        assert model.loss() == 0
        assert quant.rounded_loss(model, model.loss, bits) < 0.8 * quant.rounded_loss(model, model.loss, uniform)


def brute(costs: dict, prices: dict, budget: float) -> float:
    best = float("inf")
    for pick in itertools.product(*(costs[n] for n in costs)):
        if sum(prices[n][b] for n, b in zip(costs, pick)) <= budget:
            best = min(best, sum(costs[n][b] for n, b in zip(costs, pick)))
    return best


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_allocation_is_exact(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))
    sizes = [data.draw(st.integers(1, 50)) for _ in range(n)]
    choices = (2, 3, 4, 6, 8)
    costs, prices = {}, {}
    for i, size in enumerate(sizes):
        drops = sorted((data.draw(st.integers(0, 1000)) for _ in choices), reverse=True)
        costs[str(i)] = dict(zip(choices, map(float, drops)))
        prices[str(i)] = {b: size * b for b in choices}
    budget = data.draw(st.integers(2 * sum(sizes), 8 * sum(sizes)))
    picks = quant.allocate(costs, prices, budget)
    assert sum(prices[k][b] for k, b in picks.items()) <= budget
    assert sum(costs[k][b] for k, b in picks.items()) == pytest.approx(brute(costs, prices, budget))


def test_many_layers_of_odd_sizes_are_quick() -> None:
    generator = torch.Generator().manual_seed(0)
    costs, prices = {}, {}
    for i in range(60):
        size = int(torch.randint(1000, 2_000_000, (1,), generator=generator))
        weight = float(torch.rand(1, generator=generator)) * size
        costs[str(i)] = {b: weight * 4.0**-b for b in (2, 3, 4, 6, 8)}
        prices[str(i)] = {b: float(size * b) for b in (2, 3, 4, 6, 8)}
    budget = 4 * sum(p[2] / 2 for p in prices.values())
    picks = quant.allocate(costs, prices, budget)
    assert sum(prices[k][b] for k, b in picks.items()) <= budget
    uniform = sum(c[4] for c in costs.values())
    assert sum(costs[k][b] for k, b in picks.items()) <= uniform


def test_full_budget_gives_full_bits_and_an_impossible_one_is_refused() -> None:
    costs = {"a": {2: 3.0, 8: 1.0}, "b": {2: 5.0, 8: 0.5}}
    prices = {"a": {2: 2, 8: 8}, "b": {2: 2, 8: 8}}
    assert quant.allocate(costs, prices, 16) == {"a": 8, "b": 8}
    with pytest.raises(UserError, match="budget"):
        quant.allocate(costs, prices, 3)


@pytest.mark.parametrize(("unit", "budget"), [("effective_bits", 4.0), ("bytes", 400), ("bops", 7e5)])
def test_auto_bits_keeps_the_budget_and_quantizes(unit: str, budget: float) -> None:
    torch.manual_seed(0)
    model = trained(Net(), 5)
    bits = quant.auto_bits(model, loss_of(model), budget, unit, example_input=X)
    assert set(bits) == {f"block{i}.conv{j}" for i in (1, 2) for j in (1, 2)}
    sizes = {n: model.get_submodule(n).weight.numel() for n in bits}
    if unit == "effective_bits":
        assert sum(sizes[n] * b for n, b in bits.items()) <= 4.0 * sum(sizes.values())
    if unit == "bytes":
        ends = model.stem.weight.numel() + model.fc.weight.numel()
        assert sum((sizes[n] * b + 7) // 8 for n, b in bits.items()) + ends <= 400
    quant.quantize(model, bits=bits)
    assert {
        n: layer.weight_quant.tensor_quant.bits for n, layer in quant.quantized_layers(model).items() if n in bits
    } == bits


def test_flatness_map_sets_the_grids_move_against_the_layers_reach() -> None:
    model = Quadratic()
    (row,) = quant.flatness_map(model, model, {"fc": 2}, rise=0.01)
    assert row["curvature"] == pytest.approx(3.5, rel=1e-5)
    assert row["reach"] == pytest.approx((2 * 0.01 / 3.5) ** 0.5, rel=1e-5)
    assert row["strain"] == pytest.approx((row["grid_move"] / row["reach"]) ** 2)


def test_bad_requests() -> None:
    model = Net()
    with pytest.raises(UserError, match="hessian"):
        quant.sensitivities(model, loss_of(model), kind="hesian")
    with pytest.raises(UserError, match="effective_bits"):
        quant.auto_bits(model, loss_of(model), 4, "bit", example_input=X)
    with pytest.raises(UserError, match=r"block1\.conv1"):
        quant.hessian_traces(model, loss_of(model), ["block1.conv9"])
    with pytest.raises(UserError, match="too low"):
        quant.auto_bits(model, loss_of(model), 3e5, "bops", example_input=X)
    with pytest.raises(UserError, match="depend"):
        quant.hessian_traces(model, lambda: torch.zeros(()))
    with pytest.raises(UserError, match="finite"):
        quant.hessian_traces(model, lambda: model(X).sum() * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        quant.sensitivities(model, lambda: model(X).sum() * float("nan"))
