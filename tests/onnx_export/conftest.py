"""Tiny quantizers that speak the lowering protocol, so that these tests need no other room's quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatcompress import graph
from flatcompress.graph import ActivationSpec, WeightSpec


class ToyQuantizer(nn.Module):
    """Rounds to a fixed grid."""

    def __init__(self, scale: float, bits: int, signed: bool) -> None:
        super().__init__()
        self.scale, self.bits, self.signed = scale, bits, signed

    def activation_spec(self) -> ActivationSpec:
        return ActivationSpec(self.scale, self.bits, self.signed)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.activation_spec()
        return torch.round(x / spec.scale).clamp(spec.qmin, spec.qmax) * spec.scale


def _weight_spec(layer: nn.Module) -> WeightSpec:
    weight, bits = layer.weight.detach(), layer.bits  # type: ignore[union-attr]
    half = 2 ** (bits - 1)
    scale = (weight.abs().flatten(1).amax(1) / half).clamp_min(1e-6)  # the far end of the grid is used: -8 .. 7
    values = torch.round(weight / scale.reshape([-1] + [1] * (weight.dim() - 1))).clamp(-half, half - 1)
    return WeightSpec(values.to(torch.int8), scale, bits)


class ToyConv(nn.Conv2d):
    """A convolution with integer weights."""

    def weight_spec(self) -> WeightSpec:
        return _weight_spec(self)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.weight_spec()
        return self._conv_forward(x, spec.values * spec.scale.reshape(-1, 1, 1, 1), self.bias)


class ToyLinear(nn.Linear):
    """A linear layer with integer weights."""

    def weight_spec(self) -> WeightSpec:
        return _weight_spec(self)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.weight_spec()
        return F.linear(x, spec.values * spec.scale.reshape(-1, 1), self.bias)


def toy_quantize(
    model: nn.Module, example: Tensor, bits: int = 4, activation_bits: int = 4, everywhere: bool = False
) -> nn.Module:
    """Quantize every layer and every tensor between them: after each ReLU, before each add, after the pool.

    everywhere: after every operator but the last.
    """
    gm = graph.trace(model.eval(), example)
    ranges = _ranges(gm, example)
    wanted = [n for n in gm.graph.nodes if (n in ranges if everywhere else _wants_quantizer(gm, n))]
    wanted = [n for n in wanted if not any(u.op == "output" for u in n.users) and n.op != "get_attr"]
    wanted += [n.args[0] for n in graph.weighted(gm) if not _covered(n.args[0], wanted)]
    quantizers = nn.Module()
    model.add_module("quantizers", quantizers)
    gm.add_module("quantizers", quantizers)
    for node in list(gm.graph.nodes):
        if node in wanted:
            low, high = ranges[node]
            signed = low < 0
            width = activation_bits if "relu" in node.name or "hardtanh" in node.name else 8
            scale = max(abs(low), high) / (2 ** (width - 1) if signed else 2**width - 1) * 0.8
            name = f"q{len(list(quantizers.children()))}"
            quantizers.add_module(name, ToyQuantizer(float(scale) or 1.0, width, signed))
            with gm.graph.inserting_after(node):
                made = gm.graph.call_module(f"quantizers.{name}", (node,))
            made.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    layers = [n.target for n in graph.weighted(gm)]
    for name in layers:
        layer = model.get_submodule(name)
        layer.__class__ = ToyConv if isinstance(layer, nn.Conv2d) else ToyLinear
        layer.bits = 8 if name in (layers[0], layers[-1]) else bits
    graph.install(model, gm)
    return model.eval()


def _ranges(gm, example):
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n] = (float(result.min()), float(result.max()))
            return result

    with torch.no_grad():
        Watch(gm).run(*(example if isinstance(example, tuple) else (example,)))
    return found


def _covered(node, wanted) -> bool:
    """Whether a layer's input is quantized already, perhaps before an operator that only moves values."""
    while node not in wanted and any(word in node.name for word in ("flatten", "max_pool", "reshape", "transpose")):
        node = node.args[0]
    return node in wanted


def _wants_quantizer(gm, node) -> bool:
    if node.op == "placeholder":
        return True
    users = list(node.users)
    if any(u.op == "output" for u in users):
        return False
    name, single = node.name, users[0] if len(users) == 1 else None
    if "relu" in name or "hardtanh" in name or "pool" in name or "mean" in name or "gelu" in name:
        return "max_pool" not in name
    if node.op == "call_module" and isinstance(gm.get_submodule(node.target), nn.LayerNorm):
        return True
    to_add = single is not None and "add" in single.name
    if to_add and node.op == "call_module":
        return True
    if "add" in name:
        return single is None or not ("relu" in single.name or "hardtanh" in single.name)
    return False


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics and gammas as training leaves them, some gammas negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator) + 0.5
            module.weight.data[::5] *= -1
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.3
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.2
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
