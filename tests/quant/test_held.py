"""Weights that are held give the bits that computing them in every forward gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import models, quant
from flatcompress.quant.quantizers.modules import QuantizedLayer

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(rounding: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = models.build("resnet8", num_classes=4, input_shape=(3, 8, 8), seed=0, width=8)
    quant.quantize(model, 4, 4, example_input=X[:2])
    quant.calibrate(model, [X])
    quant.set_bias_rounding(model, rounding)
    return model


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_are_the_same_bits_and_nothing_stays(rounding: bool, training: bool) -> None:
    model = network(rounding).train(training)
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        expected = model.eval()(X)
        model.train(training)
        with quant.held(model):
            assert [m.training for m in model.modules()] == modes
            assert torch.equal(model.eval()(X), expected)
            model.train(training)
    assert not any({"quantized_weight", "shift"} & set(vars(m)) for m in model.modules())


def test_weights_are_computed_once_and_anew_where_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = network().eval(), []
    real = QuantizedLayer.quantized_weight
    monkeypatch.setattr(QuantizedLayer, "quantized_weight", lambda self: (counted.append(1), real(self))[1])
    with quant.held(model):
        once = len(counted)
        with torch.no_grad():
            model(X), model(X)
        assert len(counted) == once == len(quant.quantized_layers(model))
        model(X).sum().backward()
        assert len(counted) == 2 * once
    assert all(layer.weight.grad is not None for layer in quant.quantized_layers(model).values())


def test_biases_follow_statistics_that_change_unless_they_are_held() -> None:
    model, other = network(), network()
    quant.reestimate_batchnorm(model, [X, X + 1])
    with quant.held(other, biases=False):
        quant.reestimate_batchnorm(other, [X, X + 1])
        with torch.no_grad():
            assert torch.equal(other.eval()(X), model.eval()(X))


def test_a_failure_inside_leaves_nothing_and_a_float_network_is_left_alone() -> None:
    model = network()
    with pytest.raises(RuntimeError), quant.held(model):
        model(X[:, :1])
    assert not any({"quantized_weight", "shift"} & set(vars(m)) for m in model.modules())
    plain = nn.Linear(2, 2)
    with quant.held(plain):
        assert "quantized_weight" not in vars(plain)
