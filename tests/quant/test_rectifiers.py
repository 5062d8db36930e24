"""A rectifier in one piece with its quantizer: the same bits, forward and backward, from fewer passes over memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatcompress import quant
from flatcompress.graph import trace
from flatcompress.quant.quantizers import function
from flatcompress.quant.quantizers.function import Quantize, QuantizeWhole, rectified
from flatcompress.quant.quantizers.lsq import Observer, StepQuantizer

LAYOUTS = {
    "contiguous": lambda v: v,
    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "a slice": lambda v: torch.cat([v, v], 1)[:, : v.shape[1]],
}
STEPS = (0.01, 0.3, 0.4, 6 / 15, 6.0, 6 / 7.5, 1.7, 1e-30)  # grids that end below 6, at it and beyond it


def values(step: float, levels: int) -> torch.Tensor:
    """[4, 3, 8, 8] with what lies on a grid's edges, on halves of its steps and on the rectifiers' ends among them."""
    v = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 4
    step32 = torch.tensor(step)
    edges = torch.cat([step32 * torch.arange(-3, levels + 2), step32 * (torch.arange(-2, levels) + 0.5)])
    planted = torch.cat([edges, torch.tensor([0.0, -0.0, 6.0, -6.0, 4.0, 1e-40, -1e-40])])[:400]
    near = torch.cat(
        [planted, torch.nextafter(planted, torch.tensor(9e9)), torch.nextafter(planted, torch.tensor(-9e9))]
    )
    v.view(-1)[: min(len(near), 700)] = near[:700]
    return v


def run(v, step, qn, qp, inside, outside):
    """Output and gradients of v and the scale."""
    v, scale = (
        v.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
        torch.tensor(step).requires_grad_(),
    )
    out = QuantizeWhole.apply(outside(v), scale, scale.detach(), qn, qp, 0.37, *inside)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(grad.contiguous(memory_format=torch.channels_last) if not v.is_contiguous() else grad)
    return out.detach(), v.grad, scale.grad


@pytest.mark.parametrize("most", [math.inf, 6.0, 4.0])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("qn", "qp"), [(0, 15), (0, 3), (128, 127), (0, 255)])
@pytest.mark.parametrize("large", [1 << 20, 100])
def test_a_rectifier_taken_in_gives_the_same_bits(most, layout, qn, qp, large, monkeypatch):
    monkeypatch.setattr(function, "_LARGE", large)
    monkeypatch.setattr(function, "_PART", 96)
    for step in STEPS:
        v = LAYOUTS[layout](values(step, qp))
        one = run(v, step, qn, qp, (most,), lambda t: t)
        two = run(v, step, qn, qp, (), lambda t: rectified(t, most))
        for a, b in zip(one, two):
            assert torch.equal(a, b), step


@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (1, 5, 1, 1)])
@pytest.mark.parametrize(("qn", "qp"), [(8, 7), (2, 1), (128, 127)])
def test_the_range_of_every_channel_is_that_of_the_comparisons(shape, qn, qp):
    g = torch.Generator().manual_seed(0)
    step = torch.rand(shape, generator=g) + 0.05
    v = torch.randn(6, 5, 4, 4, generator=g) * step * qp
    for k, at in enumerate((-qn, qp, qp - 0.5, 0)):
        edge = (step * at).expand_as(v[..., :1, :1])[..., 0, 0]
        v[..., k, 0], v[..., k, 1] = edge, torch.nextafter(edge, torch.tensor(9e9))
        v[..., k, 2] = torch.nextafter(edge, torch.tensor(-9e9))
    v.requires_grad_()
    scale = step.clone().requires_grad_()
    out = Quantize.apply(v, scale, step, qn, qp, 0.37)
    grad = torch.randn(v.shape, generator=g)
    out.backward(grad)
    inside = (v > step * -qn) & (v < step * qp)
    assert torch.equal(out, (v / step).round().clamp(-qn, qp) * step)
    assert torch.equal(v.grad, torch.where(inside, grad, 0.0))
    product = (out - torch.where(inside, v, 0.0)).detach() * grad
    summed = product.flatten(1).sum(1).view(shape) if shape[0] > 1 else product.sum_to_size(shape)
    assert torch.equal(scale.grad, summed / step * 0.37)


class Net(nn.Module):
    """Three rectifiers that a quantizer alone reads, and one that the result has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.r6, self.tanh = nn.ReLU6(inplace=True), nn.Hardtanh(0.0, 2.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.r6(self.norm(self.a(x)))
        x = self.tanh(self.b(x))
        x = torch.relu(self.c(x))
        y = torch.relu(self.d(x))
        return self.head(y.mean((2, 3))), y


def quantized(kind: str = "lsq") -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(8, 3, 5, 5)
    quant.quantize(net, 4, 4, example_input=x, method=kind)
    quant.calibrate(net, [x])
    return net


def test_what_runs_has_only_the_rectifier_that_others_read_and_what_is_shown_has_all():
    net, given = quantized(), []
    for quantizer in quant.activation_quantizers(net).values():
        quantizer.register_forward_hook(lambda module, args, out: given.append(args[1:]))
    net(torch.randn(2, 3, 5, 5))
    assert [args[0] for args in given if args] == [6.0, 2.5, math.inf]
    shown = trace(net, torch.randn(2, 3, 5, 5)).graph
    names = [str(node.target) for node in shown.nodes if node.op == "call_function"]
    assert [name.split(".")[1] for name in names if "relu" in name or "tanh" in name] == ["hardtanh"] * 2 + ["relu"] * 2


@pytest.mark.parametrize("kind", ["lsq", "lsq+", "pact"])
def test_a_network_computes_and_learns_what_its_shown_graph_does(kind):
    net = quantized(kind)
    other = trace(net, torch.randn(2, 3, 5, 5))
    x = torch.randn(8, 3, 5, 5) * 3
    for mode in (True, False):
        results = []
        for model in (net.train(mode), other.train(mode)):
            net.zero_grad()
            out, features = model(x)
            (out.square().sum() + features.sum()).backward()
            results.append([out, features, *(p.grad.clone() for p in net.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_rectified_quantizer_that_observes_or_starts_sees_what_the_rectifier_leaves():
    v = torch.tensor([[-3.0, 2.0, 8.0, 1.0]])
    first = StepQuantizer(4, False, per_sample=True)
    first.quantize(v, 6.0)
    assert float(first.scale.detach()) == pytest.approx(2 * (2 + 6 + 1) / 4 / math.sqrt(15))
    first.observer = Observer("q")
    assert first.quantize(v, 6.0).tolist() == [[0.0, 2.0, 6.0, 1.0]]
    assert (first.observer.low, first.observer.high) == (0.0, 6.0)
    first.observer = None
    assert first.quantize(v.bfloat16(), math.inf).dtype is torch.float32


def test_a_network_copied_and_reloaded_takes_its_rectifiers_in_again():
    net = quantized()
    again = quant.apply(Net(), net.quantizers.data)
    again.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 5, 5)
    for a, b in zip(net.eval()(x), again.eval()(x)):
        assert torch.equal(a, b)
