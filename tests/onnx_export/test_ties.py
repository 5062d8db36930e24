"""Scales without ties: no sum of integers that can occur lies on a rounding boundary."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from flatcompress import models, quant
from flatcompress.onnx_export import check_target, export, lower, untie
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.lower.ties import LARGEST, MARGIN, NUDGE, fraction


class Gated(nn.Module):
    """A residual addition, a global pool and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.gate, self.last = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.norm(self.second(x))
        x = x * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(x, 1)))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def quantized(model: nn.Module, x: Tensor, bits: int, **options: object) -> nn.Module:
    quant.quantize(model, weight_bits=bits, activation_bits=bits, example_input=x[:2], **options)  # type: ignore[arg-type]
    quant.calibrate(model, [x])
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def distance(value: Tensor) -> float:
    """How near values lie to the middle between two codes."""
    return float((value - value.floor() - 0.5).abs().min())


def layer_sums(module: integer.IntegerLayer) -> float:
    """The same of every integer sum that lands on the grid, over all channels."""
    assert module.out_grid is not None
    nearest = 0.5
    for m in (module.in_grid.scale * module.scale.double() / module.out_grid.scale).tolist():
        reach = math.ceil(256 / m)
        nearest = min(nearest, distance(torch.arange(-reach, reach + 1).double() * m))
    return nearest


def pair_sums(module: integer.IntegerAdd) -> float:
    a, b = (torch.arange(g.low, g.high + 1).double() - g.zero_point for g in (module.first, module.second))
    value = ((a * module.first.scale).unsqueeze(1) + b * module.second.scale) / module.out_grid.scale
    codes = value + module.out_grid.zero_point
    return distance(value[(codes >= module.out_grid.low - 1) & (codes <= module.out_grid.high + 1)])


def nearest_of_all(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Per operator of the lowered model: the distance of its nearest sum from a boundary."""
    found = {}
    for name, module in lower(model, x[:2]).named_modules():
        if isinstance(module, integer.IntegerLayer) and module.out_grid is not None:
            found[name] = layer_sums(module)
        elif isinstance(module, integer.IntegerAdd):
            found[name] = pair_sums(module)
        elif isinstance(module, integer.IntegerPool | integer.IntegerMul):
            pixels = 64 if isinstance(module, integer.IntegerPool) else 1
            first = module.in_grid if isinstance(module, integer.IntegerPool) else module.first
            second = 1.0 if isinstance(module, integer.IntegerPool) else module.second.scale
            m = first.scale * second / (pixels * module.out_grid.scale)
            found[name] = distance(torch.arange(-256 * 256, 256 * 256).double() * m)
    return found


@pytest.mark.parametrize("value", [0.5, 0.25, 1 / 3, 0.001234, 7.3e-5])
def test_a_fraction_is_near_and_has_an_odd_denominator(value: float) -> None:
    found = float(fraction(torch.tensor([value], dtype=torch.float64))[0])
    assert abs(found / value - 1) <= NUDGE
    whole = torch.arange(1, LARGEST, 2).double() * found
    assert float((whole - whole.round()).abs().min()) < 1e-9
    assert distance(torch.arange(-100_000, 100_000).double() * found) >= 1 / (2 * LARGEST)


def test_a_value_too_small_for_every_denominator_has_no_fraction() -> None:
    assert math.isnan(float(fraction(torch.tensor([1e-7], dtype=torch.float64))[0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_sum_that_can_occur_lies_on_a_boundary(bits: int, x: Tensor) -> None:
    torch.manual_seed(3)
    model = quantized(Gated(), x, bits)
    assert min(nearest_of_all(model, x).values()) < MARGIN / 2  # there is something to do
    found = untie(model, x[:2])
    assert not found.left and len(found.moved) == 7
    after = nearest_of_all(model, x)
    assert len(after) == 7 and min(after.values()) > MARGIN / 2, after


def test_scales_move_by_less_than_a_thousandth_and_zero_points_stay(x: Tensor) -> None:
    torch.manual_seed(3)
    model = quantized(Gated(), x, 8, method="lsq+")
    before = copy.deepcopy(model)
    assert untie(model, x[:2]).moved
    for (name, old), (_, new) in zip(before.named_modules(), model.named_modules()):
        if hasattr(old, "activation_spec") and hasattr(old, "tensor_quant"):
            a, b = old.activation_spec(), new.activation_spec()
            assert a.zero_point == b.zero_point and abs(b.scale / a.scale - 1) <= NUDGE, name
        elif hasattr(old, "weight_spec"):
            ratio = new.weight_spec().scale / old.weight_spec().scale
            assert float((ratio - 1).abs().max()) <= NUDGE, name


def test_what_cannot_be_moved_alone_is_left_and_named(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.last = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.norm(self.conv(torch.relu(self.conv(x))))).mean((2, 3)))

    torch.manual_seed(0)
    model = Twice()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([0.7, 1.9]))
    found = untie(quantized(model, x, 8), x[:2])
    assert "more than once" in found.left["conv"]
    alone = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten())
    with torch.no_grad():
        alone[1].weight.copy_(torch.tensor([0.7, 1.9]))
    found = untie(quantized(alone, x, 8, per_channel=False), x[:2])
    assert found.left == {"0": "its channels share a scale"}


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_openvino_gives_every_code_of_a_file_without_ties(name: str, tmp_path: object) -> None:
    pytest.importorskip("openvino")
    model = models.build(name, num_classes=10, input_shape=(1, 16, 16), seed=0)
    images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model.train()(images)
    quant.quantize(model, weight_bits=7, activation_bits=8, first_last_bits=7, example_input=images[:2])
    quant.calibrate(model.eval(), [images])
    untie(model, images[:2])
    exported = export(model, images[:2], f"{tmp_path}/model.onnx", "openvino")
    found = check_target(exported, [images], "openvino")
    assert found["run"]["largest_error_steps"] < 1e-3
