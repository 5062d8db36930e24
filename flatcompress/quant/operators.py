"""The operators of a traced graph, sorted by what they do to a quantized tensor; and the two edits of a graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from flatcompress.graph.cost import MATMULS
from flatcompress.graph.remodularize import PRODUCTS
from flatcompress.graph.rewrite import first_input

aten = torch.ops.aten

SHAPES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.transpose.int,
    aten.permute.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.contiguous.default, aten.clone.default, aten.t.default, aten.movedim.int, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default,
}  # fmt: skip
# values are moved, dropped or repeated, and zeros added; never changed
PASSES = SHAPES | {
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.max_pool2d.default, aten.max_pool2d_with_indices.default,
    aten.max_pool1d.default, aten.max_pool3d.default, aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default, aten.upsample_nearest2d.vec, aten.roll.default, aten.pixel_shuffle.default,
    aten.channel_shuffle.default, aten.flip.default, operator.getitem,
}  # fmt: skip
RELUS = {aten.relu.default, aten.relu6.default}
NONNEGATIVE = RELUS | {
    aten.softmax.int,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.abs.default,
    aten.exp.default,
    aten.softplus.default,
    aten.square.default,
}
# what a gate multiplies with: squeeze-and-excite, spatial attention, GLU
GATES = {aten.sigmoid.default, aten.hardsigmoid.default, aten.tanh.default, aten.hardtanh.default, aten.relu6.default}
POOLS = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default}
MEANS = {aten.mean.dim}
FREE_LAYERS = {
    *PRODUCTS, aten.embedding.default,
}  # fmt: skip
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}


@dataclass
class TensorRow:
    """A tensor that gets a quantizer after ``node``; ``readers`` take its output instead of the node's."""

    name: str
    bits: int
    signed: bool
    why: str
    node: fx.Node
    readers: list[fx.Node]


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node only moves values: its output is on whatever grid its input is on."""
    if node.op == "call_module":
        kinds = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.Identity
        return isinstance(model.get_submodule(str(node.target)), kinds)
    if node.target is operator.getitem:  # of a split or a pool's values; of a recurrent layer it is something new
        return isinstance(node.args[0], fx.Node) and node.args[0].target in PASSES
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return is_zero_pad(node)
    return node.target in PASSES


def is_zero_pad(node: fx.Node) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0.0)
    return not isinstance(mode, str) or mode != "constant" or not value


def hoist_scalars(gm: fx.GraphModule) -> None:
    """(c * q) k^T -> c * (q k^T): an attention that scales its query first would need a second grid for it."""
    for product in [n for n in gm.graph.nodes if n.target in MATMULS]:
        for factor in [a for a in product.args if isinstance(a, fx.Node)]:
            while factor.target in SHAPES and len(factor.users) == 1:
                factor = first_input(factor)
            scaling = factor.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(factor.args[1], int | float)
            if not scaling or len(factor.users) != 1:
                continue
            assert callable(factor.target)
            with gm.graph.inserting_after(product):
                scaled = gm.graph.call_function(factor.target, (product, factor.args[1]))
            scaled.meta.update(product.meta)
            product.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)
            factor.replace_all_uses_with(first_input(factor))
            gm.graph.erase_node(factor)
    gm.graph.lint()


def insert(gm: fx.GraphModule, rows: list[TensorRow], holder: str) -> None:
    """Put a ``call_module`` of ``holder.name`` after each row's node. The modules must exist on ``gm``."""
    for row in rows:
        with gm.graph.inserting_after(row.node):
            node = gm.graph.call_module(f"{holder}.{row.name}", (row.node,))
        node.meta.update(row.node.meta)
        node.meta["path"] = f"{holder}.{row.name}"
        for reader in row.readers:
            reader.replace_input_with(row.node, node)
    gm.graph.lint()
    gm.recompile()
