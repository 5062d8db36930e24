"""What a model costs as a function of its widths: MACs, parameters, bytes, without building the smaller model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcompress.modules import evaluating
from flatcompress.prune.channels import keep_channels
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.attention import find_attention
from flatcompress.prune.dependency.groups import Group
from flatcompress.prune.dependency.recurrent import RECURRENT, output_width
from flatcompress.prune.inputs import Example, batch_size, call, tensors_of


class Width(NamedTuple):
    """Channels of one layer after a cut, and its convolution groups."""

    inputs: int
    outputs: int
    groups: int


Widths = dict[str, Width]
Cost = Callable[[Widths], float]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer.

    ``positions``: outputs per channel and sample. ``kernel``: weights per pair of channels.
    """

    width: Width
    positions: int
    kernel: int
    bias: bool
    depthwise: bool

    def weights(self, width: Width) -> int:
        """Weights at ``width``."""
        return width.outputs * (width.inputs // width.groups) * self.kernel


class CostModel:
    """Layers of ``model`` with what a forward of ``example_input`` says about them; costs of any widths.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    >>> costs = CostModel(net, torch.zeros(1, 3, 10, 10))
    >>> costs.macs(costs.dense), costs.params(costs.dense)
    (15872.0, 260.0)
    """

    def __init__(self, model: nn.Module, example_input: Example) -> None:
        self.layers = _measure(model, example_input)
        outputs = [block.output for block in find_attention(model) if block.output in self.layers]
        self.attention = [(name, self.layers[name].positions) for name in outputs]
        weighted = sum(layer.weights(layer.width) for layer in self.layers.values())
        biases = sum(layer.width.outputs for layer in self.layers.values() if layer.bias)
        norms = {
            n: m
            for n, m in model.named_modules()
            if axes.cuttable(m) and not isinstance(m, (_ConvNd, nn.Linear, *RECURRENT))
        }
        self._norms = {name: axes.width(module, axes.OUT) for name, module in norms.items()}
        self._per_channel = {
            name: sum(p.numel() for p in module.parameters(recurse=False)) / self._norms[name]
            for name, module in norms.items()
        }
        total = sum(p.numel() for p in model.parameters())
        in_norms = sum(self._per_channel[name] * width for name, width in self._norms.items())
        self._fixed = total - weighted - biases - in_norms

    @property
    def dense(self) -> Widths:
        """Widths of the model as it is: convolutions, linear layers and (inputs = outputs) norms."""
        found = {name: layer.width for name, layer in self.layers.items()}
        return found | {name: Width(width, width, 1) for name, width in self._norms.items()}

    def widths(self, groups: Sequence[Group], keep: Sequence[Tensor]) -> Widths:
        """Widths after keeping ``keep`` (bool [units] per group)."""
        kept = keep_channels(groups, keep)
        return self._narrowed({key: (int(mask.sum()), len(mask)) for key, mask in kept.items()})

    def by_count(self, groups: Sequence[Group]) -> Callable[[Sequence[int]], Widths]:
        """Widths as a function of the number of units removed per group, fast enough to search over.

        Exact where all units of a member have the same number of channels, which coupling ensures but for odd models.
        """
        totals = {(m.name, m.axis): len(m.owner) for g in groups for m in g.members}
        sizes = [[((m.name, m.axis), int((m.owner >= 0).sum()) / g.units) for m in g.members] for g in groups]

        def widths(gone: Sequence[int]) -> Widths:
            kept: dict[tuple[str, str], float] = {}
            for members, count in zip(sizes, gone, strict=True):
                for key, size in members if count else ():
                    kept[key] = kept.get(key, totals[key]) - count * size
            return self._narrowed({key: (round(value), totals[key]) for key, value in kept.items()})

        return widths

    def _narrowed(self, kept: dict[tuple[str, str], tuple[int, int]]) -> Widths:
        found = self.dense
        for (name, axis), (left, total) in kept.items():
            if name in self._norms:
                found[name] = Width(left, left, 1)
            elif name in found:
                found[name] = _narrowed(found[name], axis, left, total, self.layers[name].depthwise)
        return found

    def macs(self, widths: Widths) -> float:
        """Multiply-accumulates per sample of convolutions, linear layers and attention products."""
        products = sum(2 * widths[name].inputs * tokens * tokens for name, tokens in self.attention)
        return float(products + sum(k.positions * k.weights(widths[n]) for n, k in self.layers.items()))

    def params(self, widths: Widths) -> float:
        """Parameters."""
        own = sum(k.weights(widths[n]) + k.bias * widths[n].outputs for n, k in self.layers.items())
        norms = sum(share * widths[name].outputs for name, share in self._per_channel.items())
        return float(own + norms + self._fixed)

    def bytes(self, widths: Widths, weight_bits: float = 8) -> float:
        """Bytes of weights at ``weight_bits`` and a 32-bit bias per output channel (BatchNorm folded); rest float32."""
        own = sum(k.weights(widths[n]) * weight_bits / 8 + 4 * widths[n].outputs for n, k in self.layers.items())
        return float(own + 4 * self._fixed)


def _narrowed(width: Width, axis: str, kept: int, total: int, depthwise: bool) -> Width:
    if depthwise:
        inputs = width.inputs * kept // total
        return Width(inputs, kept, inputs)
    return width._replace(outputs=kept) if axis == axes.OUT else width._replace(inputs=kept)


def _recurrent(module: nn.Module, values: int) -> Layer:
    """What reads the input of a recurrent layer; its other weights do not change with a cut."""
    slots = [tensor for _, tensor, _ in axes.tensors(module, axes.IN)]
    inputs, rows = axes.width(module, axes.IN), sum(len(tensor) for tensor in slots)
    return Layer(Width(inputs, rows, 1), values // output_width(module), 1, False, False)


def _measure(model: nn.Module, example_input: Example) -> dict[str, Layer]:
    found: dict[str, Layer] = {}

    batch = batch_size(example_input)

    def record(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(module, RECURRENT):
            found[name] = _recurrent(module, tensors_of(output)[0].numel() // batch)
            return
        outputs = axes.width(module, axes.OUT)
        width = Width(axes.width(module, axes.IN), outputs, module.groups if isinstance(module, _ConvNd) else 1)
        weight = module.get_parameter("weight")
        kernel = weight.numel() * width.groups // (width.inputs * outputs)
        positions = output.numel() // (outputs * batch)
        found[name] = Layer(width, positions, kernel, module.bias is not None, axes.is_depthwise(module))

    hooks = [
        m.register_forward_hook(lambda mod, _, out, n=n: record(n, mod, out))
        for n, m in model.named_modules()
        if isinstance(m, (_ConvNd, nn.Linear, *RECURRENT))
    ]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return found
