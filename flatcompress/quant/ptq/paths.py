"""One graph, two paths: what the network computes in float, and what it computes quantized, node by node.

The quantized model's graph is walked with the float network beside it: a quantizer is an identity and a layer has its
own weights on the float path. All calibration batches are taken over a node at once, so that a layer can be put right
before the next one sees its output, at the cost of one forward pass; a value is dropped after its last reader.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.errors import UserError
from flatcompress.quant.layers import HOLDER, graph_of
from flatcompress.quant.quantizers.modules import QuantizedLayer

Values = dict[fx.Node, list[Any]]


class Paths:
    """``model`` (quantized) and ``twin`` (the float network it was made from, same names), both in eval mode."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        self.model, self.twin = model, twin
        self.nodes: list[fx.Node] = list(graph_of(model).nodes)
        if sum(n.op == "placeholder" for n in self.nodes) != 1:
            raise UserError("post-training quantization and its diagnosis take networks of one input tensor.")
        calls = [str(n.target) for n in self.nodes if n.op == "call_module"]
        self.shared = {name for name in calls if calls.count(name) > 1}
        self._last = self._last_readers()

    def _last_readers(self) -> dict[fx.Node, list[fx.Node]]:
        """For every node the values that nobody reads after it."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        dropped: dict[fx.Node, list[fx.Node]] = {}
        for source, reader in last.items():
            dropped.setdefault(reader, []).append(source)
        return dropped

    def layer(self, node: fx.Node) -> QuantizedLayer | None:
        """The quantized layer that ``node`` calls, if it calls one."""
        found = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        return found if isinstance(found, QuantizedLayer) else None

    def is_quantizer(self, node: fx.Node) -> bool:
        """Whether ``node`` calls an activation quantizer."""
        return node.op == "call_module" and str(node.target).startswith(f"{HOLDER}.")

    def norm_after(self, node: fx.Node) -> nn.Module | None:
        """The BatchNorm with running statistics that alone reads ``node``, if there is one."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        found = self.model.get_submodule(str(user.target)) if user.op == "call_module" else None
        plain = isinstance(found, nn.BatchNorm1d | nn.BatchNorm2d) and found.track_running_stats
        return found if plain and str(user.target) not in self.shared else None

    def value(self, node: fx.Node, values: Values, batch: int, quantized: bool) -> Any:
        """What ``node`` gives for one batch, its inputs taken from ``values``."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n][batch])
        if node.op == "get_attr":
            return _attribute(self._owner(str(node.target), quantized), str(node.target))
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            if self.is_quantizer(node) and not quantized:
                return args[0]
            made = self.layer(node)
            if made is not None and not quantized and not _has(self.twin, str(node.target)):
                with weight_replaced(made, made.weight):  # a layer that quantizing itself has made
                    return made(*args, **kwargs)
            return self._module(str(node.target), quantized)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _module(self, name: str, quantized: bool) -> nn.Module:
        return self._owner(name, quantized).get_submodule(name)

    def _owner(self, name: str, quantized: bool) -> nn.Module:
        """The float network, but for what the trace has added, which only the quantized model has."""
        if quantized or not _has(self.twin, name):
            return self.model
        return self.twin

    def advance(
        self,
        nodes: Sequence[fx.Node],
        values: Values,
        batches: Sequence[Tensor],
        quantized: bool,
        before: Callable[[fx.Node, Values], None] | None = None,
        after: Callable[[fx.Node, list[Any]], None] | None = None,
        keep: Sequence[fx.Node] = (),
    ) -> None:
        """Compute ``nodes`` for all batches into ``values``; hooks see a node before it runs and its outputs after."""
        for node in nodes:
            if before is not None:
                before(node, values)
            if node.op == "placeholder":
                values[node] = list(batches)
            else:
                values[node] = [self.value(node, values, i, quantized) for i in range(len(batches))]
            if after is not None:
                after(node, values[node])
            for source in self._last.get(node, ()):
                if source not in keep:
                    values.pop(source, None)


def _has(model: nn.Module, name: str) -> bool:
    try:
        _attribute(model, name)
    except AttributeError:
        return False
    return True


def _attribute(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def float_layer(paths: Paths, name: str) -> nn.Module:
    """The float network's layer of that name, or the quantized network's own where it alone has one."""
    return (paths.twin if _has(paths.twin, name) else paths.model).get_submodule(name)


def float_twin(model: nn.Module) -> nn.Module:
    """A copy of a float model, for `Paths`: frozen, in eval mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def weight_replaced(layer: QuantizedLayer, weight: Tensor) -> Iterator[None]:
    """``layer`` computes with ``weight`` as it is, instead of its own on its grid."""
    layer.quantized_weight = lambda: weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.quantized_weight


def out_axis(layer: QuantizedLayer) -> int:
    """The dimension of ``layer``'s output that counts its channels: 1 behind a convolution, the last behind linear."""
    return -1 if isinstance(layer, nn.Linear) else 1


@torch.no_grad()
def channel_moments(outputs: Sequence[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over batches and positions, float64 [C]."""
    parts = []
    for output in outputs:
        dims = [d for d in range(output.dim()) if d != axis % output.dim()]
        variance, mean = torch.var_mean(output, dims, correction=0)
        parts.append((mean.double(), variance.double(), output.numel() // output.shape[axis]))
    count = sum(n for _, _, n in parts)
    mean = torch.stack([m * n for m, _, n in parts]).sum(0) / count
    spread = torch.stack([(v + (m - mean).square()) * n for m, v, n in parts]).sum(0) / count
    return mean, spread
