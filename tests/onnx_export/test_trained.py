"""The file beside the model that was trained: equal where it can be, and where it is not, said why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatcompress import quant
from flatcompress.onnx_export import Exported, certify, export

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def _norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


class Repeated(nn.Module):
    """One convolution, a norm of its own behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(8, 8, 3, padding=1), nn.ModuleList([_norm(), _norm()])

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return x


class SharedBoth(nn.Module):
    """The same convolution and the same norm, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), _norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(F.relu(self.norm(self.conv(x))))))


class ReadTwice(nn.Module):
    """A convolution whose result is normalised and also added as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), _norm()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.norm(y)) + y


class Shifted(nn.Module):
    """Scale and shift per channel by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.gain, self.shift = (nn.Parameter(torch.rand(8, 1, 1) + 0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gain + self.shift


class Attending(nn.Module):
    """A softmax of a convolution's own result, which onnxruntime has an inexact 8-bit kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).softmax(3)


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 8, 3, padding=1), _norm())


def written(
    middle: nn.Module, path: Path, bits: int, ignore: tuple[str, ...] = (), size: int = 8
) -> tuple[Any, Exported]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 4),
    )  # fmt: skip
    quant.quantize(model, bits, bits, example_input=X, ignore=ignore, max_float_macs=1.0)
    quant.calibrate(model, [X])
    quant.set_bias_rounding(model)
    return model, export(model.eval(), X[:2], path / "model.onnx", "int8")


def certificate(middle: nn.Module, path: Path, bits: int, ignore: tuple[str, ...] = ()) -> Any:
    model, exported = written(middle, path, bits, ignore)
    return certify(exported, [X], model=model, latency_runs=0, write=False, evaluations=4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [Repeated, SharedBoth])
def test_a_repeated_layer_folds_the_norm_of_each_call(make: type[nn.Module], bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = certificate(make(), tmp_path, bits)
    assert found["holds"], found["failures"]
    assert found["integer"]["share_of_macs"] == 1.0
    assert found["trained"]["file"]["largest_error_steps"] <= 1.0 or found["trained"]["stepwise"]["holds"]


@pytest.mark.parametrize(
    ("make", "ignore"), [(ReadTwice, ()), (Shifted, ("2.conv",)), (transposed, ("2",)), (Attending, ())]
)
def test_the_runtime_takes_no_other_arithmetic_by_itself(make: Any, ignore: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = certificate(make(), tmp_path, 8, ignore=ignore)
    assert found["holds"], found["failures"]
    assert found["parity"]["optimized"]["largest_error_steps"] < 0.01


def test_what_rounding_does_not_explain_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, exported = written(SharedBoth(), tmp_path, 8)
    own = certify(exported, [X], model=model, latency_runs=0, write=False, evaluations=4)
    assert not own["warnings"]
    with torch.no_grad():
        model[2].norm.bias += 0.1  # another model than the file's
    found = certify(exported, [X], model=model, latency_runs=0, write=False, evaluations=4)
    assert found["holds"]  # the file is its reference
    assert found["trained"]["stepwise"]["wrong"][0]["name"] == "quantizers.2_relu"
    assert any("quantizers.2_relu" in warning for warning in found["warnings"])
