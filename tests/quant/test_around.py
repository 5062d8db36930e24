"""What stands around the quantizers: SAQ's point, rounding, BatchNorm, oscillations, distillation."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Encoder, Net, trained
from torch import nn

from flatcompress import graph, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export.lower import fold as writer
from flatcompress.plan import Plan, Step, apply_plan
from flatcompress.quant.qat.rounding import BiasRounding

torch.set_num_threads(1)
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(7))
Y = torch.arange(16) % 4


def net(bits: int = 3) -> Net:
    torch.manual_seed(0)
    model = trained(Net(), 5)
    quant.quantize(model, bits, bits)
    quant.calibrate(model, [X])
    return model


def plan_of(model: nn.Module) -> Plan:
    return Plan([Step("quantizers", model.quantizers.data)])


# -- SAQ -------------------------------------------------------------------------------------------------------------


def test_offset_gradient_is_the_gradient_at_the_quantizers_output() -> None:
    model = net()
    point = quant.QuantizedPoint(model)
    layer = model.block1.conv1
    seen = {}
    original = layer.quantized_weight

    def spying() -> torch.Tensor:
        out = original()
        out.retain_grad()
        seen["q"] = out
        return out

    layer.quantized_weight = spying
    model.eval()
    model(X).square().mean().backward()
    offset = point.offsets[list(point.layers).index("block1.conv1")]
    assert torch.equal(offset.grad, seen["q"].grad) and float(offset.grad.abs().sum()) > 0


def test_latent_moves_are_rounded_away_and_quantized_ones_are_not() -> None:
    model = net().eval()
    expected = model(X)
    layer = model.block1.conv1
    z = layer.weight.detach() / layer.weight_quant.tensor_quant.step()
    room = (0.5 - (z - z.round()).abs()).min() * layer.weight_quant.tensor_quant.step().min()
    with torch.no_grad():
        layer.weight.add_(0.5 * room)
    assert torch.equal(model(X), expected)  # smaller than the way to the next edge: nothing happened
    point = quant.QuantizedPoint(model)
    with torch.no_grad():
        point.offsets[list(point.layers).index("block1.conv1")].add_(0.5 * room + 1e-3)
    assert not torch.equal(model(X), expected)
    point.release()
    assert torch.equal(model(X), expected)


def test_saq_runs_on_the_flat_engine_and_never_trains_offsets() -> None:
    from flatcompress import flat

    for rho in (0.0, 0.1):
        model, plain = net(), net()
        point = quant.QuantizedPoint(model)
        base = torch.optim.SGD([{"params": list(model.parameters())}, {"params": point.offsets}], lr=0.01, momentum=0.9)
        optimizer = flat.create("sam", model, base, rho=rho, compose=point.compose, perturbed=point.perturbed)
        reference = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
        model.train(), plain.train()
        for _ in range(2):
            for module in (*model.modules(), *plain.modules()):
                if isinstance(module, nn.Dropout):
                    module.eval()
            optimizer.zero_grad()

            def closure(m: nn.Module = model) -> torch.Tensor:
                loss = nn.functional.cross_entropy(m(X), Y)
                loss.backward()
                return loss

            optimizer.step(closure)
            reference.zero_grad()
            nn.functional.cross_entropy(plain(X), Y).backward()
            reference.step()
        assert all((t == 0).all() for t in point.offsets)
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
        assert same == (rho == 0.0)


# -- rounding, BatchNorm ---------------------------------------------------------------------------------------------


def test_rounding_is_off_at_first_and_small_when_on() -> None:
    model = net(4).eval()
    expected = model(X)
    quant.set_bias_rounding(model, True)
    rounded = model(X)
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0.2, atol=0.2)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(X), rounded)
    quant.set_bias_rounding(model, False)
    assert torch.equal(model(X), expected) and torch.equal(clone(X), rounded)
    fresh = apply_plan(Net(), plan_of(clone))
    fresh.load_state_dict(clone.state_dict())
    assert torch.equal(fresh.eval()(X), rounded)  # whether biases are rounded is part of the state
    assert not any("bias_rounding" in str(n.target) for n in graph.trace(model, X).graph.nodes)
    with pytest.raises(UserError, match="not quantized"):
        quant.set_bias_rounding(Net())


def test_rounded_biases_are_the_writers_integers() -> None:
    model = net(4).eval()
    with torch.no_grad():
        model.block1.bn1.weight[0] *= -1
    pairs = {"stem": "bn", "block1.conv1": "block1.bn1", "block2.conv2": "block2.bn2", "fc": None}
    made = {n: m for n, m in model.bias_rounding.items() if isinstance(m, BiasRounding)}
    for name, norm in pairs.items():
        layer, spec = model.get_submodule(name), model.get_submodule(name).weight_spec()
        rounding = made[name.replace(".", "_")]
        folded = writer.fold(spec.values, spec.scale, layer.bias, [model.get_submodule(norm)] if norm else [])
        s_x = rounding._parts[2].activation_spec().scale
        fine, whole = writer.integer_bias(folded, s_x, graph.headroom(folded.values, spec.bits))
        step = (torch.tensor(s_x) * fine.scale).double()
        torch.testing.assert_close(rounding.shift() + folded.bias, whole.double() * step, rtol=1e-9, atol=1e-12)


def test_rounding_works_behind_linear_layers_of_any_rank() -> None:
    torch.manual_seed(0)
    model = Encoder()
    quant.quantize(model, 4, 4)
    x = torch.randn(5, 4, 6)
    quant.calibrate(model, [x])
    model.eval()
    expected = model(x)
    quant.set_bias_rounding(model, True)
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)


def test_reestimated_statistics_are_the_mean_over_batches() -> None:
    model = net()
    halves = [X[:8], X[8:]]
    seen: list[torch.Tensor] = []
    hook = model.bn.register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    model.train()
    model.dropout.eval()
    quant.reestimate_batchnorm(model, halves)
    hook.remove()
    means = torch.stack([t.mean((0, 2, 3)) for t in seen]).mean(0)
    torch.testing.assert_close(model.bn.running_mean, means)
    assert model.bn.momentum == 0.1 and model.training and not model.dropout.training


def test_failed_reestimation_keeps_the_old_statistics() -> None:
    model = net()
    before = copy.deepcopy(model.bn.state_dict())
    with pytest.raises(UserError, match="at least one"):
        quant.reestimate_batchnorm(model, [])
    with pytest.raises(UserError, match="'bn'"):
        quant.reestimate_batchnorm(model, [X * float("nan")])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.bn.state_dict().values()))


# -- oscillations ----------------------------------------------------------------------------------------------------


def one_layer(weight: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    quant.quantize(model, 3, 3, example_input=torch.randn(2, 2))
    layer = model[1]
    layer.weight_quant.tensor_quant.set_scale(torch.full((2, 1), 0.5))
    with torch.no_grad():
        layer.weight.fill_(weight)
    return model


def test_oscillation_frequency_by_hand() -> None:
    model = one_layer(0.0)
    tracker = quant.OscillationTracker(model, momentum=0.01)
    seen = []
    for integer in (0, 1, 0, 1):
        with torch.no_grad():
            model[1].weight.fill_(integer * 0.5)
        tracker.step()
        seen.append(float(tracker._tracks["1"].frequency[0, 0]))
    assert seen == pytest.approx([0, 0, 0.01, 0.0199], abs=1e-6)
    again = quant.OscillationTracker(model)
    again.load_state_dict(copy.deepcopy(tracker.state_dict()))
    assert again.share() == tracker.share() == {"1": 1.0}


def test_monotone_drift_is_no_oscillation() -> None:
    model = one_layer(0.0)
    tracker = quant.OscillationTracker(model)
    for integer in (-3, -2, -1, 0, 0, 1, 2):
        with torch.no_grad():
            model[1].weight.fill_(integer * 0.5)
        tracker.step()
    assert tracker.share() == {"1": 0.0}


def test_frozen_weights_stay_at_the_mean_integer() -> None:
    model = one_layer(0.0)
    tracker = quant.OscillationTracker(model, momentum=0.3, threshold=0.2)
    for integer in (1, 2, 1, 2, 1, 2, 3, 3):
        with torch.no_grad():
            model[1].weight.fill_(integer * 0.5)
        tracker.step()
    assert tracker.frozen_share() == {"1": 1.0}
    held = model[1].weight_spec().values
    assert len(held.unique()) == 1 and int(held[0, 0]) in (1, 2)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    tracker.step()
    assert torch.equal(model[1].weight_spec().values, held)


def test_dampening_gradient_by_hand() -> None:
    model = one_layer(0.0)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.6, 0.5], [-0.2, 9.0]]))
    quant.dampening_loss(model).backward()
    torch.testing.assert_close(model[1].weight.grad, torch.tensor([[0.2, 0.0], [-0.4, 0.0]]))
    assert model[0].weight.grad is None  # 8 bit: not watched


# -- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_loss_is_the_scaled_divergence() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    loss = quant.distillation_loss(s, t, 2.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert t.grad is None and s.grad is not None
