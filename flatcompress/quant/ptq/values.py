"""Where the values of attention can be transformed: from the layer that makes them to the one that reads the mixture.

A product of attention's weights and values mixes tokens, never the features of a head: A (V P) = (A V) P. So a head's
values may be multiplied by an invertible P in the layer that makes them if the layer that reads them undoes it; both
products fold into weights (the transformation between the two of FlatQuant, arXiv 2410.09426).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.quant.ptq.pairs import Refused, called_once

aten = torch.ops.aten
# Where the values stand among the arguments of a product.
_PRODUCTS = {aten.matmul.default: 1, aten.bmm.default: 1, aten.scaled_dot_product_attention.default: 2}
_MOVES: set[Any] = {
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unbind.int,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default,
    aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default, operator.getitem,
}  # fmt: skip


@dataclass
class ValuePath:
    """One attention's values. ``features`` [heads, d]: rows of ``producer`` that are a head's values.

    ``columns`` [heads, d]: columns of ``reader`` that read them, in the same order. ``tensor``: what the reader reads.
    """

    name: str
    producer: nn.Linear
    reader_name: str
    reader: nn.Linear
    features: Tensor
    columns: Tensor
    tensor: fx.Node

    @property
    def readers(self) -> dict[str, nn.Module]:
        """The reader by name, as a `Pair` has several."""
        return {self.reader_name: self.reader}

    @torch.no_grad()
    def move(self, matrices: Tensor) -> None:
        """Multiply the values of every head by its matrix [heads, d, d], and undo it in the reader, in place."""
        rows, columns = self.features.flatten(), self.columns.flatten()
        made = self.producer.weight[rows].view(*self.features.shape, -1)
        self.producer.weight[rows] = torch.einsum("hij,hik->hjk", matrices, made).flatten(0, 1)
        if self.producer.bias is not None:
            bias = self.producer.bias[rows].view(self.features.shape)
            self.producer.bias[rows] = torch.einsum("hij,hi->hj", matrices, bias).flatten()
        self.reader.weight[:, columns] = undone(self.reader.weight[:, columns], torch.linalg.inv(matrices))


def undone(weight: Tensor, inverse: Tensor) -> Tensor:
    """A reader's weight [outputs, heads * d] for values that were multiplied, given the inverses [heads, d, d]."""
    heads, size = inverse.shape[:2]
    return torch.einsum("hij,ohj->ohi", inverse, weight.view(-1, heads, size)).flatten(1)


def find_values(gm: fx.GraphModule, example: Tensor) -> tuple[list[ValuePath], dict[str, str]]:
    """Every attention whose values can be transformed, and why others cannot, by the layer that makes them.

    Which feature belongs to which head is read off the network itself: the producer's features are numbered, and the
    numbers looked up where they arrive. ``example``: inputs [B, ...].
    """
    found, refused = [], {}
    for product in gm.graph.nodes:
        source = _source(gm, product)
        if source is None:
            continue
        try:
            found.append(_path(gm, product, source, example))
        except Refused as reason:
            if str(reason):
                refused[str(source.target)] = str(reason)
    return found, refused


def _source(gm: fx.GraphModule, product: fx.Node) -> fx.Node | None:
    """The linear layer that a product's last factor comes from, moved about and nothing else."""
    at = _PRODUCTS.get(product.target)  # type: ignore[call-overload]
    node = None if at is None else product.args[at]
    while isinstance(node, fx.Node) and node.target in _MOVES:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and _is_linear(gm, node) else None


def _is_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and type(gm.get_submodule(str(node.target))) is nn.Linear


def _path(gm: fx.GraphModule, product: fx.Node, source: fx.Node, example: Tensor) -> ValuePath:
    values = product.args[_PRODUCTS[product.target]]  # type: ignore[index]
    assert isinstance(values, fx.Node)
    probe = _Probe(gm, source, values, product)
    probe.find_features(example)
    reader = _reader(gm, product)
    for node in (source, reader):
        called_once(gm, node)
    features, columns = probe.columns_of(reader, example)
    tensor = reader.args[0]
    assert isinstance(tensor, fx.Node)
    layers = [gm.get_submodule(str(node.target)) for node in (source, reader)]
    return ValuePath(str(source.target), layers[0], str(reader.target), layers[1], features, columns, tensor)  # type: ignore[arg-type]


def _reader(gm: fx.GraphModule, product: fx.Node) -> fx.Node:
    """The one linear layer that reads a product, moved about and nothing else."""
    node = product
    while True:
        users = [user for user in node.users if user.target is not aten.sym_size.int]
        if len(users) != 1:
            raise Refused(f"{len(users)} operators read {node.name}")
        node = users[0]
        if _is_linear(gm, node):
            return node
        quiet = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.Dropout | nn.Identity)
        if not (quiet or node.target in _MOVES):
            raise Refused(f"{node.target if node.op == 'call_module' else node.name} reads it")


class _Probe(fx.Interpreter):
    """Runs the network with a layer's features numbered, and looks where the numbers arrive."""

    def __init__(self, gm: fx.GraphModule, source: fx.Node, values: fx.Node, product: fx.Node) -> None:
        super().__init__(gm)
        self._from, self._values, self._product = source, values, product
        self._seen: dict[fx.Node, Tensor] = {}
        self._features: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self._from:
            value = torch.arange(value.shape[-1], dtype=value.dtype, device=value.device).expand(value.shape)
        elif n is self._product and self._features is not None:
            value = self._features.expand(value.shape).to(value.dtype)
        if n is self._values or n in self._seen:
            self._seen[n] = value
        return value

    def find_features(self, example: Tensor) -> None:
        """Which feature stands at every place of the values [..., 1, d]; Refused where tokens differ in that."""
        self.run(example)
        seen = self._seen[self._values]
        first = seen[..., :1, :]
        if seen.dim() < 3 or not torch.equal(seen, first.expand(seen.shape)):
            raise Refused("")  # keys, whose last axis counts tokens: no values, so nothing to say
        if torch.unique(first).numel() != torch.unique(first.flatten(0, -3), dim=0).numel():
            raise Refused("heads share values")
        self._features = first

    def columns_of(self, reader: fx.Node, example: Tensor) -> tuple[Tensor, Tensor]:
        """Features by head [heads, d], and the columns of ``reader`` that read them."""
        tensor = reader.args[0]
        assert isinstance(tensor, fx.Node) and self._features is not None
        self._seen[tensor] = torch.empty(0)
        self.run(example)
        order = self._seen[tensor].flatten(0, -2)
        if not torch.equal(order, order[:1].expand(order.shape)):
            raise Refused(f"{reader.target} does not read the same features at every token")
        heads = torch.unique(self._features.flatten(0, -3).squeeze(-2), dim=0).long()
        column = {int(feature): at for at, feature in enumerate(order[0].long())}
        if sorted(column) != sorted(heads.flatten().tolist()) or len(column) != order.shape[1]:
            raise Refused(f"{reader.target} reads other features too")
        columns = torch.tensor([[column[int(f)] for f in head] for head in heads], device=heads.device)
        return heads, columns
