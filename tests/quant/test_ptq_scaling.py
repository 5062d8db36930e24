"""Moving factors between layers leaves the float network what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Block, Encoder, Net, trained
from torch import nn

from flatcompress.graph import trace
from flatcompress.quant.ptq import SCALINGS
from flatcompress.quant.ptq.pairs import find_pairs


class Chain(nn.Module):
    """Every kind of reader: a plain, a depthwise and a grouped convolution, a pool and a linear layer."""

    input_shape = (3, 8, 8)

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv3 = nn.Conv2d(8, 12, 1, groups=2)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(12, 4)
        self.act = nn.ModuleList(activation() for _ in range(3))
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act[1](self.conv2(self.act[0](self.bn1(self.conv1(x)))))
        x = self.average(self.pool(self.act[2](self.conv3(x)))).flatten(1)
        return self.fc(x)


def uneven(model: nn.Module) -> nn.Module:
    """Channels of very different size, as trained networks have them; running statistics that fit."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm):
            factors = torch.rand(module.weight.shape[0], generator=generator) * 4 + 0.05
            module.weight.data.mul_(factors.view(-1, *[1] * (module.weight.dim() - 1)))
    return trained(model).eval()


@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize("make", [Chain, lambda: Chain(nn.ReLU6), lambda: Chain(nn.LeakyReLU), Net, Encoder,
                                  lambda: Net(relu6=True, final=False)])  # fmt: skip
def test_the_float_function_stays(scaling, make):
    torch.manual_seed(0)
    model = uneven(make())
    x = torch.randn(16, *model.input_shape)
    expected = model(x).detach()
    SCALINGS[scaling].make(trace(model, x), [x])
    assert float((model(x) - expected).detach().abs().max() / expected.abs().max()) < 1e-5


def test_equalization_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=True), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([8.0, 0.5]).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([4.0, 1.0]))
        model[2].weight.copy_(torch.tensor([2.0, 2.0]).view(1, 2, 1, 1))
    rows = SCALINGS["equalize"].make(trace(model, torch.zeros(2, 1, 2, 2)), [])
    # s = sqrt(r1 r2) / r2 = (2, 0.5); both ranges become sqrt(r1 r2)
    assert model[0].weight.flatten().tolist() == pytest.approx([4.0, 1.0])
    assert model[0].bias.tolist() == pytest.approx([2.0, 2.0])
    assert model[2].weight.flatten().tolist() == pytest.approx([4.0, 1.0])
    assert rows[0]["layer"] == "0" and rows[0]["readers"] == ["2"]


def test_equalized_ranges_are_equal_on_both_sides():
    model = uneven(Chain())
    SCALINGS["equalize"].make(trace(model, torch.zeros(2, 3, 8, 8)), [])
    pairs, _ = find_pairs(trace(model, torch.zeros(2, 3, 8, 8)))
    for pair in pairs:
        assert torch.allclose(pair.producer_range(), pair.reader_range(), rtol=1e-2)


def test_smoothing_by_hand():
    model = Encoder().eval()
    x = torch.randn(8, 4, 6)
    seen = {}
    model.qkv.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    model(x)
    before = copy.deepcopy(model.qkv.weight.detach())
    SCALINGS["smooth"].make(trace(model, x), [x])
    reach = seen["x"].abs().amax((0, 1))
    factors = (reach / before.abs().amax(0)).sqrt()
    assert torch.allclose(model.qkv.weight, before * factors, rtol=1e-4)


def test_what_is_left_alone_is_said_with_its_reason():
    _, refused = find_pairs(trace(Net().eval(), torch.zeros(2, 3, 8, 8)))
    assert "block1.conv2" in refused and "not homogeneous" in refused["block1.conv2"]
    rows = SCALINGS["equalize"].make(trace(Chain(nn.ReLU6).eval(), torch.zeros(2, 3, 8, 8)), [])
    assert all("ReLU6" in row["skipped"] for row in rows if row["layer"] in ("conv1", "conv2", "conv3"))


def test_a_dead_channel_is_left_as_it_is():
    model = uneven(Chain())
    with torch.no_grad():
        model.bn1.weight[0] = 0
        model.conv3.weight[0] = 0
    x = torch.randn(8, 3, 8, 8)
    expected = model(x)
    for name in ("equalize", "smooth-all"):
        SCALINGS[name].make(trace(model, x), [x])
    assert torch.isfinite(model(x)).all() and torch.allclose(model(x), expected, atol=1e-4)


def test_a_layer_called_twice_is_in_no_pair():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    pairs, refused = find_pairs(trace(Twice().eval(), torch.zeros(2, 3, 4, 4)))
    assert pairs == [] and "more than once" in refused["a"]


def test_residual_blocks_give_the_pairs_inside_them():
    pairs, _ = find_pairs(trace(nn.Sequential(Block(4), nn.Conv2d(4, 2, 1)).eval(), torch.zeros(2, 4, 4, 4)))
    assert [p.name for p in pairs] == ["0.conv1"]
