"""Linear layers that follow or accompany one another, made one: parallel branches and chains without an activation.

A sum of convolutions of the same input, each with its BatchNorm, and of the input itself (with or without one) is one
convolution in evaluation mode (RepVGG, arXiv 2101.03697, section 3.3):
    kernel = sum of g_b K_b, smaller kernels padded with zeros to the largest
    bias = sum of beta_b + g_b (b_b - mean_b)
with g = gamma / sqrt(var + eps). Two layers in a row without an activation between them are one as well, where padding
allows it: the second is pointwise, or the first is and the second pads nothing (padding is of zeros, not of the first
layer's bias). Both are exact up to rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from flatcompress.errors import UserError
from flatcompress.graph.rewrite import traced_shape
from flatcompress.graph.tracing import trace
from flatcompress.modules import modes_kept

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Folded:
    """One fold: the new layer's name and the layers that it takes the place of."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Linear:
    """A linear map of ``source``: weight [out, in / groups, *kernel] (None: the identity, by a gain) and bias, float64.

    ``layers``: what it is made of; ``joined``: how many sums and chains are in it. A linear layer has no kernel.
    """

    source: fx.Node
    weight: Tensor | None
    bias: Tensor
    gain: Tensor
    geometry: tuple[Any, ...] = ()
    groups: int = 1
    layers: tuple[str, ...] = ()
    joined: int = 0

    def kernel(self, groups: int, like: Tensor) -> Tensor:
        """The weight, of the identity too: ones in the middle of a kernel of one pixel."""
        if self.weight is not None:
            return self.weight
        out, per_group = len(self.gain), len(self.gain) // groups
        eye = torch.zeros(out, per_group, *[1] * (like.dim() - 2), dtype=torch.float64, device=like.device)
        rows = torch.arange(out, device=like.device)
        eye[(rows, rows % per_group)] = self.gain.reshape(-1, *[1] * (like.dim() - 2))
        return eye


def fold(model: nn.Module, example_input: Any) -> tuple[fx.GraphModule, list[Folded]]:
    """A copy of ``model`` in evaluation mode with its branches and chains of linear layers folded, and what was folded.

    ``example_input``: a tensor or a tuple of them, as in `trace`; the result is compared with the model on it,
    UserError when they differ by more than 1e-5 of the largest output. The copy has no BatchNorm in a fold, so train
    before folding.

    >>> gm, folds = fold(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
    >>> [found.layers for found in folds]
    [('0', '1')]
    """
    gm = trace(copy.deepcopy(model).eval(), example_input)
    found = _Finder(gm)
    folds: list[Folded] = []
    for node in reversed(list(gm.graph.nodes)):
        linear = found.of(node) if node.users else None  # a node inside a fold has lost its readers
        if linear is not None and linear.joined:
            folds.append(_replace(gm, node, linear))
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()
    _compare(model, gm, example_input)
    return gm, folds[::-1]


class _Finder:
    """What every node of a graph computes, where that is linear in one other node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._known: dict[fx.Node, _Linear | None] = {}

    def of(self, node: fx.Node) -> _Linear | None:
        """The linear map that ends in ``node``; None where there is none."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> _Linear | None:
        if node.target is torch.ops.aten.add.Tensor and not node.kwargs:
            return self._sum(*node.args)
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        module, source, name = self.gm.get_submodule(str(node.target)), node.args[0], str(node.target)
        inner = self.of(source) if len(source.users) == 1 else None
        if type(module) in NORMS:
            return self._norm(module, source, inner, name)
        own = _layer(module, source, name)
        return own if own is None or inner is None else _chain(inner, own) or own

    def _norm(self, norm: Any, source: fx.Node, inner: _Linear | None, name: str) -> _Linear | None:
        if norm.running_var is None:
            return None
        gain = torch.rsqrt(norm.running_var.double() + norm.eps)
        gain = gain if norm.weight is None else gain * norm.weight.detach().double()
        bias = -norm.running_mean.double() * gain
        bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        if inner is None:
            return _Linear(source, None, bias, gain, layers=(name,))
        weight = None if inner.weight is None else inner.weight * gain.reshape(-1, *[1] * (inner.weight.dim() - 1))
        layers = (*inner.layers, name)
        if weight is not None and weight.dim() == 2 and len(traced_shape(source)) != 2:
            return None  # a BatchNorm over the steps of a sequence, whose features a linear layer made
        total = gain if weight is not None else inner.gain * gain
        return replace(inner, weight=weight, bias=inner.bias * gain + bias, gain=total, layers=layers)

    def _sum(self, a: Any, b: Any) -> _Linear | None:
        """Two maps of the same input, added; one of them may be the input itself."""
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        one, two = (self.of(n) if len(n.users) == 1 else None for n in (a, b))
        for known, other in ((one, b), (two, a)):
            if known is not None and known.source is other:
                ones, zeros = torch.ones_like(known.bias), torch.zeros_like(known.bias)
                return _added(known, _Linear(other, None, zeros, ones))
        return None if one is None or two is None or one.source is not two.source else _added(one, two)


def _layer(module: nn.Module, source: fx.Node, name: str) -> _Linear | None:
    """A convolution with padding of zeros, or a linear layer."""
    if type(module) is not nn.Linear and (type(module) not in CONVOLUTIONS or module.padding_mode != "zeros"):
        return None
    weight = module.weight.detach().double()  # type: ignore[union-attr, operator]
    out = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    bias = out if module.bias is None else module.bias.detach().double()  # type: ignore[union-attr, operator]
    if isinstance(module, nn.Linear):
        return _Linear(source, weight, bias, torch.ones_like(out), layers=(name,))
    if isinstance(module.padding, str):
        return None
    geometry = (module.stride, module.padding, module.dilation)
    return _Linear(source, weight, bias, torch.ones_like(out), geometry, int(module.groups), (name,))  # type: ignore[arg-type]


def _added(a: _Linear, b: _Linear) -> _Linear | None:
    """a + b as one map; None where their geometries do not meet."""
    if len(a.bias) != len(b.bias):
        return None
    if a.weight is None or (b.weight is not None and b.weight.shape[2:] > a.weight.shape[2:]):
        a, b = b, a  # a has the largest kernel
    if a.weight is None or a.weight.dim() == 2:
        return None  # two identities, or linear layers: sums of those are no branches of a network
    kernel = b.kernel(a.groups, a.weight)
    stride, padding, dilation = a.geometry
    unit = (1,) * len(stride)
    s, p, d = b.geometry or (unit, (0,) * len(stride), unit)
    unlike = b.weight is not None and (b.groups != a.groups or (d != dilation and max(kernel.shape[2:]) > 1))
    if s != stride or unlike or kernel.shape[1] != a.weight.shape[1]:
        return None
    margins: list[int] = []
    for big, small, pa, pb, step in zip(a.weight.shape[2:], kernel.shape[2:], padding, p, dilation):
        before = (pa - pb) // step  # where the small kernel lies in the big one
        if (pa - pb) % step or before < 0 or before + small > big:
            return None
        margins = [before, big - small - before, *margins]
    weight = a.weight + nn.functional.pad(kernel, margins)
    layers, joined = (*a.layers, *b.layers), a.joined + b.joined + 1
    return replace(a, weight=weight, bias=a.bias + b.bias, layers=layers, joined=joined)


def _chain(first: _Linear, second: _Linear) -> _Linear | None:
    """second(first(x)) as one map; None where padding or groups stand between them."""
    w1, w2 = first.weight, second.weight
    if w1 is None or w2 is None or w1.dim() != w2.dim() or first.groups != 1 or second.groups != 1:
        return None
    joined, layers = first.joined + second.joined + 1, (*first.layers, *second.layers)
    if w1.dim() == 2:
        return replace(first, weight=w2 @ w1, bias=w2 @ first.bias + second.bias, layers=layers, joined=joined)
    stride, padding, _ = second.geometry
    flat_bias = w2.flatten(2).sum(2) @ first.bias + second.bias
    if all(k == 1 for k in w2.shape[2:]) and not any(padding) and all(s == 1 for s in stride):
        weight = torch.einsum("om,mi...->oi...", w2.flatten(1), w1)
        return replace(first, weight=weight, bias=flat_bias, layers=layers, joined=joined)
    s, p, _ = first.geometry
    if all(k == 1 for k in w1.shape[2:]) and not any(p) and all(x == 1 for x in s) and not any(padding):
        weight = torch.einsum("om...,mi->oi...", w2, w1.flatten(1))
        return replace(second, source=first.source, weight=weight, bias=flat_bias, layers=layers, joined=joined)
    return None


def _replace(gm: fx.GraphModule, node: fx.Node, linear: _Linear) -> Folded:
    """Put one layer with the folded weight in the place of ``node``."""
    weight = linear.weight
    assert weight is not None
    like = next(p for p in gm.parameters() if p.is_floating_point())
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        stride, padding, dilation = linear.geometry
        kind: Any = CONVOLUTIONS[weight.dim() - 3]
        layer = kind(
            weight.shape[1] * linear.groups, weight.shape[0], tuple(weight.shape[2:]), stride, padding, dilation,
            linear.groups,
        )  # fmt: skip
    layer.load_state_dict({"weight": weight, "bias": linear.bias})
    name = f"folded_{node.name.lstrip('_')}"
    gm.add_submodule(name, layer.to(like).eval())
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(name, (linear.source,))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code()
    return Folded(name, linear.layers)


@torch.no_grad()
def _compare(model: nn.Module, gm: fx.GraphModule, example_input: Any) -> None:
    """UserError when the folded copy computes something else than the model in evaluation mode."""
    given = example_input if isinstance(example_input, tuple) else (example_input,)
    with modes_kept(model):
        expected = tree_leaves(model.eval()(*given))
    found = tree_leaves(gm(*given))
    size = max(max(float(y.abs().max()) for y in expected), 1e-12)
    off = max(float((z - y).abs().max()) for z, y in zip(found, expected, strict=True))
    if not off <= TOLERANCE * size:
        raise UserError(f"the folded {type(model).__name__} is off by {off:.2g} of {size:.2g}: it stays as it is.")
