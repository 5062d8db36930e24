"""Train with the biases the exported file will have.

An integer kernel adds its bias in int32, on the grid s_x * s_w. So a folded bias b' (the layer's own, or what
BatchNorm makes of it) becomes round(b' / step) * step in the file. `set_bias_rounding` puts that difference into the
forward, so that the last epochs train what runs: after BatchNorm (or after the layer without one) every channel is
moved by round(b' / step) * step - b', with b' and step from the running statistics and the scales as they are.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph import headroom
from flatcompress.graph.rewrite import first_input
from flatcompress.quant.operators import passes
from flatcompress.quant.quantizers.modules import ActivationQuantizer, QuantizedLayer

ROUNDING = "bias_rounding"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def set_bias_rounding(model: nn.Module, on: bool = True) -> None:
    """Switch rounded biases on or off in a quantized model's forward; off after `quantize`.

    The graph that `trace` gives is unaffected: whoever writes the file rounds by themselves.
    """
    holder = getattr(model, ROUNDING, None)
    if holder is None:
        raise UserError(f"{type(model).__name__} is not quantized: call flatcompress.quant.quantize first.")
    for module in holder.values():
        module.enabled = on


def with_rounding(model: nn.Module, clean: fx.Graph) -> fx.GraphModule:
    """``clean`` plus a (disabled) `BiasRounding` behind every quantized layer that has a bias to round.

    They are always there, because a forward cannot be exchanged once somebody has wrapped it.
    """
    graph, holder = copy.deepcopy(clean), nn.ModuleDict()
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), QuantizedLayer):
            _add(model, graph, node, holder)
    model.add_module(ROUNDING, holder)
    return fx.GraphModule(model, graph)


def _add(model: nn.Module, graph: fx.Graph, node: fx.Node, holder: nn.ModuleDict) -> None:
    layer = model.get_submodule(str(node.target))
    quantizer = _input_quantizer(model, node)
    assert isinstance(layer, QuantizedLayer)
    norm = _norm(model, graph, node)
    if quantizer is None or (layer.bias is None and norm is None):
        return
    after = next(iter(node.users)) if norm is not None else node
    name = re.sub(r"\W", "_", node.name)
    while hasattr(holder, name):  # a layer may be called keys, or data
        name += "_"
    holder[name] = BiasRounding(layer, norm, quantizer)
    with graph.inserting_after(after):
        new = graph.call_module(f"{ROUNDING}.{name}", (after,))
    after.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _input_quantizer(model: nn.Module, node: fx.Node) -> ActivationQuantizer | None:
    source = first_input(node)
    while passes(model, source):
        source = first_input(source)
    found = model.get_submodule(str(source.target)) if source.op == "call_module" else None
    return found if isinstance(found, ActivationQuantizer) else None


def _norm(model: nn.Module, graph: fx.Graph, node: fx.Node) -> nn.Module | None:
    """The BatchNorm that folds into this call of a layer: its only reader."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    found = model.get_submodule(str(user.target)) if user.op == "call_module" else None
    return found if isinstance(found, _NORMS) and found.track_running_stats else None


class BiasRounding(nn.Module):
    """x + (rounded bias - bias) per channel, [B, C, ...] behind a convolution, [B, ..., C] behind a linear layer."""

    on: torch.Tensor

    def __init__(self, layer: QuantizedLayer, norm: nn.Module | None, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        # In the state dict, because a reloaded model must compute what the saved one did; the plain copy spares the
        # forward a read from the device.
        self.register_buffer("on", torch.zeros((), dtype=torch.bool))
        self._enabled = False
        self._parts = (layer, norm, quantizer)  # a tuple: they are the model's, not this module's

    @property
    def enabled(self) -> bool:
        """Whether the forward rounds."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._enabled = on
        self.on.fill_(on)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._enabled = bool(self.on)

    @torch.compiler.disable
    @torch.no_grad()
    def shift(self) -> torch.Tensor:
        """rounded - exact folded bias, [C]: computed in double precision, as the writer does."""
        layer, norm, quantizer = self._parts
        spec = layer.weight_spec()
        scale = spec.scale.double().expand(layer.weight.shape[layer.axis])
        if layer.axis == 1:  # of a transposed convolution, whose groups share their scales
            scale = scale.repeat(getattr(layer, "groups", 1))
        bias = torch.zeros(len(scale), device=scale.device).double() if layer.bias is None else layer.bias.double()
        if isinstance(norm, _NORMS):
            assert norm.running_mean is not None and norm.running_var is not None
            gain = torch.rsqrt(norm.running_var.double() + norm.eps)
            gain = gain if norm.weight is None else gain * norm.weight.double()
            bias = (bias - norm.running_mean.double()) * gain
            bias = bias if norm.bias is None else bias + norm.bias.double()
            scale = scale * torch.where(gain == 0, torch.ones_like(gain), gain.abs())
        scale = (scale / 2 ** headroom(spec.values, spec.bits)).float()
        step = (torch.tensor(quantizer.activation_spec().scale, device=scale.device) * scale).double()
        return torch.round(bias / step) * step - bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        shift = self.shift().to(x)
        return x + (shift if isinstance(self._parts[0], nn.Linear) else shift.view(-1, *[1] * (x.dim() - 2)))
