"""Gates and functions of one quantized tensor: the layers around them stay on integers, file and reference agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import toy_quantize
from torch import nn
from torch.nn import functional as F

from flatcompress import quant
from flatcompress.onnx_export import certify, export, lower
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.runtime.sessions import kernels, run, session


class Squeeze(nn.Module):
    """A squeeze-and-excite block between convolutions, with any activation."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.down, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.activation(self.stem(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = self.activation(self.last(x * gate))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def quantized(activation, x: torch.Tensor) -> nn.Module:
    """Weights of 7 bits: 8 saturate in the kernels of processors without VNNI."""
    model = toy_quantize(Squeeze(activation), x, bits=7, activation_bits=8, everywhere=True)
    model.stem.bits = model.head.bits = 7
    return model


ACTIVATIONS = {"hardswish": F.hardswish, "silu": F.silu, "mish": F.mish, "leaky": lambda x: F.leaky_relu(x, 0.1)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_network_runs_on_integers_and_equals_its_reference(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    model = quantized(ACTIVATIONS[name], x)
    exported = export(model, x, tmp_path / "m.onnx", "int8")
    found = kernels(exported.path)
    assert found.counts["QLinearConv"] == 4 and found.counts["QLinearMul"] >= 1, found.counts
    with torch.no_grad():
        expected, trained = exported.reference(x).numpy(), model(x).numpy()
    step = (expected.max() - expected.min()) / 255
    assert np.abs(run(session(exported.path), [x.numpy()]) - expected).max() <= step
    assert np.abs(trained - expected).max() <= 2 * step


@pytest.mark.parametrize("profile", ["packed", "int8"])
def test_squeeze_and_excite_with_hardswish_computes_on_integers(profile, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 12, 12)
    model = Squeeze(F.hardswish)
    quant.quantize(model, 8, 8, example_input=x)
    quant.calibrate(model, [x])
    exported = export(model.eval(), x, tmp_path / "m.onnx", profile)
    certificate = certify(exported, [x], latency_runs=0, require_integer=True)
    assert certificate["integer"]["share_of_macs"] >= 0.95
    assert certificate["holds"] or profile == "int8", certificate["failures"]  # int8 saturates without VNNI


def test_a_slow_function_is_a_table_and_the_table_is_the_function(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    model = quantized(F.mish, x)
    reference = export(model, x, tmp_path / "m.onnx", "int8").reference
    found = [m for m in reference.modules() if isinstance(m, integer.Table)]
    assert len(found) == 2
    codes = torch.arange(256.0)
    expected = integer.Quantize(found[0].out_grid)(F.mish(integer.Dequantize(found[0].in_grid)(codes)))
    torch.testing.assert_close(found[0](codes), expected, rtol=0, atol=0)


def test_a_function_that_is_fast_in_floats_is_no_table():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    assert not any(isinstance(m, integer.Table) for m in lower(quantized(F.hardswish, x), x).modules())
