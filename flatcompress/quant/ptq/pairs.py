"""Where a factor per channel can move from one layer to the next without changing what the network computes.

If everything between a producer (a layer with its BatchNorm, or a LayerNorm) and all its readers is positively
homogeneous, f(x / s) = f(x) / s for s > 0, the producer's channel c may be divided by s_c and the readers' input
channel c multiplied by it (arXiv 1906.04721, section 4.1). ReLU, leaky ReLU and pools are; ReLU6 is only below its
ceiling; GELU is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from flatcompress.graph.rewrite import first_input
from flatcompress.quant.operators import POOLS, RELUS, is_zero_pad

aten = torch.ops.aten
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # rows of their weights are outputs, columns inputs
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_HOMOGENEOUS = POOLS | {
    aten.relu.default, aten.leaky_relu.default, aten.max_pool2d.default, aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default, aten.clone.default, aten.contiguous.default,
}  # fmt: skip
_PADS = {aten.pad.default, aten.constant_pad_nd.default}


@dataclass
class Pair:
    """``producer``: the layer (None for a LayerNorm); ``affine``: whose weight and bias are divided.

    ``readers``: layers whose input channels are multiplied; ``tensor``: the node that they read, or the activation
    that saturates before it, at ``ceiling`` (None where none does).
    """

    name: str
    producer: nn.Module | None
    affine: nn.Module
    readers: dict[str, nn.Module]
    tensor: fx.Node
    ceiling: float | None

    def channels(self) -> int:
        """How many factors there are."""
        return self.affine.weight.shape[0]  # type: ignore[union-attr, return-value, index]

    def producer_range(self) -> Tensor:
        """max|w| per output channel of the producer, with its BatchNorm folded in, [C]."""
        assert self.producer is not None
        rows = self.producer.weight.detach().flatten(1).abs().amax(1)  # type: ignore[operator, union-attr]
        if isinstance(self.affine, _NORMS):
            assert self.affine.running_var is not None
            rows = rows * self.affine.weight.detach().abs() * torch.rsqrt(self.affine.running_var + self.affine.eps)
        return rows

    def reader_range(self) -> Tensor:
        """max|w| per input channel over all readers, [C]."""
        return torch.stack([columns(module).amax(1) for module in self.readers.values()]).amax(0)

    @torch.no_grad()
    def move(self, factors: Tensor) -> None:
        """Divide the producer's channels by ``factors`` [C] and multiply the readers' by them, in place."""
        for name in ("weight", "bias"):
            value = getattr(self.affine, name, None)
            if value is not None:
                value.div_(factors.to(value).view(-1, *[1] * (value.dim() - 1)))
        for module in self.readers.values():
            scale_inputs(module, factors)


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def columns(module: nn.Module) -> Tensor:
    """|w| of a layer by input channel, [in channels, elements]."""
    weight: Tensor = module.weight.detach().abs()  # type: ignore[operator, union-attr, assignment]
    groups = _groups(module)
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return rows.permute(0, 2, 1, 3).reshape(groups * weight.shape[1], -1)


def scale_inputs(module: nn.Module, factors: Tensor) -> None:
    """Multiply a layer's weights by ``factors`` [in channels], whatever its groups."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups = _groups(module)
    per_row = factors.to(weight).reshape(groups, weight.shape[1]).repeat_interleave(weight.shape[0] // groups, 0)
    weight.mul_(per_row.view(*per_row.shape, *[1] * (weight.dim() - 2)))


def find_pairs(gm: fx.GraphModule) -> tuple[list[Pair], dict[str, str]]:
    """Every pair of ``gm`` (a traced float network), and by producer why it is in none."""
    found, refused = [], {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or not isinstance(gm.get_submodule(str(node.target)), (*LAYERS, nn.LayerNorm)):
            continue
        try:
            found.append(_pair(gm, node))
        except Refused as reason:
            refused[str(node.target)] = str(reason)
    return found, refused


class Refused(Exception):
    """Why a layer is left as it is."""


def _pair(gm: fx.GraphModule, node: fx.Node) -> Pair:
    module = gm.get_submodule(str(node.target))
    called_once(gm, node)
    producer: nn.Module | None = module
    affine, end = module, node
    if isinstance(module, nn.LayerNorm):
        producer = None
        if module.weight is None or module.weight.dim() != 1:
            raise Refused("its LayerNorm has no factor per channel")
    else:
        norm = _only_norm(gm, node)
        if norm is not None:
            affine, end = gm.get_submodule(str(norm.target)), norm
            called_once(gm, norm)
            if affine.weight is None:
                raise Refused("its BatchNorm has no factor per channel")
    walk = _Walk(gm, end)
    return Pair(str(node.target), producer, affine, walk.readers, walk.tensor(), walk.ceiling)


def _only_norm(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    is_norm = user.op == "call_module" and isinstance(gm.get_submodule(str(user.target)), _NORMS)
    return user if is_norm else None


def called_once(gm: fx.GraphModule, node: fx.Node) -> None:
    """Refused where the graph calls ``node``'s module anywhere else."""
    if sum(n.op == "call_module" and n.target == node.target for n in gm.graph.nodes) > 1:
        raise Refused(f"{node.target} is called more than once")


class _Walk:
    """From a producer along homogeneous operators to all its readers."""

    def __init__(self, gm: fx.GraphModule, start: fx.Node) -> None:
        self.gm = gm
        self.readers: dict[str, nn.Module] = {}
        self.ceiling: float | None = None
        self._read: list[fx.Node] = []
        self._saturating: list[fx.Node] = []
        self._follow(start)
        if not self.readers:
            raise Refused("no layer reads it")

    def tensor(self) -> fx.Node:
        return (self._saturating or self._read)[0]

    def _follow(self, node: fx.Node) -> None:
        for user in node.users:
            if user.target is aten.sym_size.int:
                continue
            if user.op == "call_module" and isinstance(self.gm.get_submodule(str(user.target)), LAYERS):
                called_once(self.gm, user)
                self.readers[str(user.target)] = self.gm.get_submodule(str(user.target))
                self._read.append(node)
            else:
                self._check(user)
                self._follow(user)

    def _check(self, user: fx.Node) -> None:
        if user.op == "call_module":
            if not isinstance(self.gm.get_submodule(str(user.target)), nn.Dropout | nn.Dropout2d | nn.Identity):
                raise Refused(f"{user.target} reads it")
        elif user.target is aten.hardtanh.default or user.target in RELUS - {aten.relu.default}:
            ends = (*user.args[1:], -1.0, 1.0)[:2] if user.target is aten.hardtanh.default else (0.0, 6.0)
            if float(ends[0]) != 0.0:  # type: ignore[arg-type]
                raise Refused(f"{user.name} saturates at both ends")
            if self._saturating:
                raise Refused("two activations that saturate read it")
            self.ceiling = float(ends[1])  # type: ignore[arg-type]
            self._saturating.append(user)
        elif not (user.target in _HOMOGENEOUS or _flat_anyway(user) or (user.target in _PADS and is_zero_pad(user))):
            raise Refused(f"{user.name} is not homogeneous")


def _flat_anyway(node: fx.Node) -> bool:
    """A mean over positions, or a flatten that only drops dimensions of size one: channels stay dimension 1."""
    source = first_input(node) if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or "val" not in source.meta:
        return False
    shape = source.meta["val"].shape
    if node.target is aten.mean.dim:
        return len(shape) == 4 and sorted(d % 4 for d in node.args[1]) == [2, 3]  # type: ignore[union-attr, operator]
    is_flatten = node.target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims)
    return is_flatten and len(shape) > 2 and all(side == 1 for side in shape[2:])


def watch(
    gm: fx.GraphModule, nodes: Iterable[fx.Node], batches: Sequence[Tensor], see: Callable[[fx.Node, Tensor], None]
) -> None:
    """Run ``gm`` on the calibration batches and hand over what each of ``nodes`` gives, batch after batch."""
    wanted = set(nodes)

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                see(n, value)
            return value

    watching = Watch(gm)
    for batch in batches:
        watching.run(batch)
