"""torch.compile around training steps: one graph, the same gradients, and the module itself wherever it is measured."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from tiny import recipe
from torch.nn import functional as F

from flatcompress import Pipeline, models, quant
from flatcompress.errors import UserError
from flatcompress.recipe import parse_recipe
from flatcompress.training import compiling


def quantized(per_channel: bool):
    model = models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    quant.quantize(model, 4, 4, example_input=x, per_channel=per_channel)
    quant.calibrate(model, [x])
    return model.train(), x


def passed(model, call, x):
    loss = F.cross_entropy(call(x), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_quantized_network_is_one_graph_with_the_same_gradients(per_channel):
    torch.compiler.reset()
    model, x = quantized(per_channel)
    loss, gradients = passed(model, model, x)
    again, _ = quantized(per_channel)
    found, other = passed(again, torch.compile(again, backend="aot_eager", fullgraph=True), x)
    assert torch.equal(found, loss)
    for key, gradient in gradients.items():
        torch.testing.assert_close(other[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=key)


@pytest.mark.parametrize("shape", [(), (6, 1, 1, 1)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("most", [None, math.inf, 6.0, 1.0])
def test_a_quantizer_gives_the_same_value_and_gradients(shape, signed, most):
    torch.compiler.reset()
    v = 3 * torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for compiled in (False, True):
        quantizer = quant.quantizers.lsq.StepQuantizer(3, signed, shape).double()
        quantizer.set_scale(torch.full(shape, 0.7))
        call = (
            torch.compile(quantizer.quantize, backend="aot_eager", fullgraph=True) if compiled else quantizer.quantize
        )
        given = v.clone().requires_grad_()
        value = call(given, most)
        value.backward(up)
        found.append((value.detach(), given.grad, quantizer.scale.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-12)


def test_a_scale_below_its_floor_acts_as_the_floor_in_both():
    quantizer = quant.quantizers.lsq.StepQuantizer(4, signed=True)
    quantizer.set_scale(torch.tensor(0.5))
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    v = torch.linspace(-1e-6, 1e-6, 9)
    with pytest.warns(UserWarning, match="fell to"):
        expected = quantizer.quantize(v)
    assert torch.equal(torch.compile(quantizer.quantize, backend="aot_eager", fullgraph=True)(v), expected)


def test_what_is_eager_inside_is_the_module_itself():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.ones(1, 3)
    with compiling.compiled(model, backend):
        with compiling.eager(model):
            model(x)
        assert not seen
        model(x)
        assert len(seen) == 1
    model(torch.ones(7, 3))
    assert len(seen) == 1


def test_without_a_compiler_it_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and none of no-such-compiler"):
        Pipeline.from_recipe(parse_recipe(recipe(compile=True), "recipe")).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_run_learns_what_the_other_does_and_its_file_holds(tmp_path):
    losses = {}
    stages = [
        {"train": {"method": "sam", "rho": 0.05, "epochs": 2, "averaging": "swad"}},
        {"quantize": {"weight_bits": 4, "activation_bits": 4, "epochs": 2}},
        {"export": {"profile": "packed"}},
    ]
    for on in (False, True):
        torch.compiler.reset()
        result = Pipeline.from_recipe(parse_recipe(recipe(compile=on, stages=stages), "recipe")).run(tmp_path / str(on))
        assert result.certificate["holds"] is True
        log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
        losses[on] = [event["loss"] for event in log if event["event"] == "epoch"]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True] != losses[False]
