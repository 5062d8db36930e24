"""Networks that are not quantized throughout, and grids other than the usual."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ToyConv, ToyLinear, ToyQuantizer, randomize_norms
from torch import nn

from flatcompress import graph, models, quant
from flatcompress.errors import UserError
from flatcompress.graph import ActivationSpec
from flatcompress.onnx_export import export
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.runtime.sessions import kernels, run, session


def inputs(count: int = 32, channels: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, 12, 12, generator=torch.Generator().manual_seed(0))


def agreement(model: nn.Module, path, x: torch.Tensor, profile: str = "packed"):
    exported = export(model, x[:2], path, profile)
    reference = parity.reference_outputs(exported.reference, [x])
    found = run(session(exported.path), [x.numpy()])
    return exported, parity.compare(reference, found, parity.output_step(reference))


@pytest.mark.parametrize("ignored", ["layer2.0.conv1", "conv1", "fc", "layer1.0.conv2"])
def test_a_layer_left_in_float_is_not_quantized_behind_ones_back(ignored, tmp_path):
    """onnxruntime quantizes float weights that stand between DequantizeLinear and QuantizeLinear, per tensor."""
    model = randomize_norms(models.build("resnet8", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8))
    x = inputs()
    quant.quantize(model, weight_bits=4, activation_bits=4, example_input=x[:2], ignore=(ignored,))
    quant.calibrate(model, [x])
    exported, found = agreement(model.eval(), tmp_path / "m.onnx", x)
    assert found["largest_error_steps"] <= 1
    counts = kernels(exported.path).counts
    assert counts["QLinearConv"] + counts.get("QGemm", 0) >= 7  # of ten: its neighbours lose a quantizer
    row = next(r for r in exported.layers if r["name"] == ignored)
    assert row["weight_bits"] == 32 and row["encoding"] == "float32"


class Chain(nn.Module):
    """Quantizer, layer, clamp, quantizer, layer."""

    def __init__(self, first: nn.Module, second: nn.Module, clamp: nn.Module, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q1, self.q2, self.clamp = first, second, clamp
        self.conv1, self.conv2 = ToyConv(channels, 8, 3), ToyConv(8, 8, 3)
        self.fc = ToyLinear(8, 4)
        for layer in (self.conv1, self.conv2, self.fc):
            layer.bits = 4

    def forward(self, x):
        x = self.q2(self.clamp(self.conv1(self.q1(x))))
        return self.fc(self.conv2(x).mean((2, 3)))


class Shifted(ToyQuantizer):
    """A grid with a zero point, as LSQ+ learns one (arXiv 2004.09576)."""

    def __init__(self, scale: float, bits: int, signed: bool, zero_point: int) -> None:
        super().__init__(scale, bits, signed)
        self.zero_point = zero_point

    def activation_spec(self) -> ActivationSpec:
        return ActivationSpec(self.scale, self.bits, self.signed, self.zero_point)

    def forward(self, x):
        spec = self.activation_spec()
        codes = torch.round(x / spec.scale) + spec.zero_point
        return (codes.clamp(spec.qmin, spec.qmax) - spec.zero_point) * spec.scale


def traceable(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Install the graph that a quantizing room would: calls of the quantizers and layers themselves."""
    tracer = _Leaves()
    gm = torch.fx.GraphModule(model, tracer.trace(model))
    for node in gm.graph.nodes:
        node.meta["path"] = ""
        if node.target == "mean":
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(torch.ops.aten.mean.dim, (node.args[0], [2, 3]))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.ReLU | nn.ReLU6 | nn.Hardtanh):
            clamp = model.get_submodule(node.target)
            low, high = (0.0, float("inf")) if isinstance(clamp, nn.ReLU) else (clamp.min_val, clamp.max_val)
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(torch.ops.aten.hardtanh.default, (node.args[0], low, high))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    _note(gm, x)
    return graph.install(model, gm).eval()


class _Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name) -> bool:
        return True


def _note(gm, x):
    class Shapes(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            n.meta["val"] = result
            n.meta["path"] = n.meta.get("path", "")
            return result

    with torch.no_grad():
        Shapes(gm).run(x)


GRIDS = {
    "relu_unsigned_4": (ToyQuantizer(0.03, 8, True), ToyQuantizer(0.1, 4, False), nn.ReLU()),
    "relu_signed": (ToyQuantizer(0.03, 8, True), ToyQuantizer(0.1, 5, True), nn.ReLU()),
    "relu6_reached": (ToyQuantizer(0.1, 8, True), ToyQuantizer(0.05, 8, False), nn.ReLU6()),
    "relu6_out_of_reach": (ToyQuantizer(0.1, 8, True), ToyQuantizer(0.01, 4, False), nn.ReLU6()),
    "hardtanh": (ToyQuantizer(0.1, 8, True), ToyQuantizer(0.02, 8, True), nn.Hardtanh(-0.5, 0.7)),
    "zero_point_unsigned": (Shifted(0.03, 8, False, 100), Shifted(0.1, 4, False, 3), nn.Hardtanh(-9, 9)),
    "zero_point_signed": (Shifted(0.03, 8, True, -7), Shifted(0.1, 4, True, 2), nn.ReLU()),
    "one_bit": (ToyQuantizer(0.1, 8, True), ToyQuantizer(0.4, 1, False), nn.ReLU()),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("profile", ["packed", "qonnx"])
def test_grids_and_clamps_become_limits_of_codes(name, profile, tmp_path):
    x = inputs(16, channels=2)
    model = traceable(Chain(*GRIDS[name]), x)
    with torch.no_grad():
        trained = model(x).numpy()
    exported, found = agreement(model, tmp_path / "m.onnx", x, profile)
    assert found["largest_error_steps"] <= 1
    if profile == "packed":
        assert found["largest_error_steps"] <= 0.01 or name == "one_bit"  # the second convolution's result is real
        assert kernels(exported.path).counts["QLinearConv"] >= 1
    reference = parity.reference_outputs(exported.reference, [x])
    # The biases are rounded, so a code may move by one here and there.
    assert parity.compare(trained, reference, parity.output_step(trained))["mean_error_steps"] < 3


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (ToyQuantizer(0.1, 16, True), "16 bits"),
        (Shifted(0.1, 8, False, 300), "zero point 300"),
        (ToyQuantizer(0.0, 8, True), "calibrate"),
        (ToyQuantizer(float("nan"), 8, True), "calibrate"),
    ],
)
def test_a_grid_no_file_can_hold_is_named(quantizer, message, tmp_path):
    x = inputs(2, channels=2)
    model = Chain(ToyQuantizer(0.1, 8, True), ToyQuantizer(0.1, 8, False), nn.ReLU())
    traceable(model, x)
    model.q2.__dict__.update(scale=quantizer.scale, bits=quantizer.bits)
    if isinstance(quantizer, Shifted):
        model.q2.__class__, model.q2.zero_point = Shifted, quantizer.zero_point
    with pytest.raises(UserError, match=f"q2.*{message}"):
        export(model, x, tmp_path / "m.onnx")


class WeightOnly(nn.Module):
    """Integer weights, real activations; images or tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = tokens
        self.conv, self.fc, self.head = ToyConv(2, 8, 3), ToyLinear(100, 64), ToyLinear(64, 4)
        for layer in (self.conv, self.fc, self.head):
            layer.bits = 4

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(2)
        x = self.head(torch.relu(self.fc(x if self.tokens else x.mean(1))))
        return x.mean(1) if self.tokens else x


class _Plain(_Leaves):
    pass


def weight_only(tokens: bool, x: torch.Tensor) -> nn.Module:
    model = WeightOnly(tokens)
    gm = torch.fx.GraphModule(model, _Plain().trace(model))
    aten = torch.ops.aten
    functions = {
        torch.relu: (aten.relu.default, ()),
        "flatten": (aten.flatten.using_ints, (2,)),
        "mean": (aten.mean.dim, ([1],)),
    }
    for node in list(gm.graph.nodes):
        if node.target in functions:
            target, more = functions[node.target]
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(target, (node.args[0], *more))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    _note(gm, x)
    return graph.install(model, gm).eval()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("profile", ["packed", "int8", "int4"])
def test_integer_weights_on_real_inputs(tokens, profile, tmp_path):
    x = inputs(16, channels=2)
    exported, found = agreement(weight_only(tokens, x), tmp_path / "m.onnx", x, profile)
    # int4 lets onnxruntime use MatMulNBits, which quantizes activations on its own
    assert found["largest_error_steps"] <= (20 if profile == "int4" else 0.01)
    counts = kernels(exported.path).counts
    assert ("MatMulNBits" in counts) == (profile == "int4")
    assert not np.isnan(found["mean_error_steps"])
    if profile != "int4":
        assert "DequantizeLinear" not in counts  # folded on load
