"""Small rewrites of an exported graph: in-place operators made functional, guards dropped, attention written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph.runtime import HOLDER

aten = torch.ops.aten
_GUARDS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


def first_input(node: fx.Node) -> fx.Node:
    """The node that is ``node``'s first argument."""
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def schema_of(target: Any) -> torch.FunctionSchema | None:
    """The schema of an ATen operator; None for anything else that a node may call."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def traced_shape(value: Any) -> tuple[Any, ...]:
    """The shape that a node's result had in the trace, symbols included; () where it is no tensor."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(found.shape) if isinstance(found, torch.Tensor) else ()


_DRAWN = {
    "bernoulli_": aten.bernoulli.p,
    "uniform_": aten.uniform.default,
    "normal_": aten.normal_functional.default,
}


def is_guard(node: fx.Node) -> bool:
    """Checks that torch.export leaves behind; they compute nothing."""
    return any(str(node.target).startswith(f"aten.{name}") for name in _GUARDS)


def written_argument(node: fx.Node) -> fx.Node | None:
    """The node an operator writes to, or None for a functional one."""
    schema = schema_of(node.target)
    if schema is None or not schema.is_mutable:
        return None
    for argument, value in zip(schema.arguments, node.args):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            return value
    return None


def functional(target: Any, where: str) -> Any:
    """``aten.add_.Tensor`` -> ``aten.add.Tensor``; other targets unchanged. UserError when there is no counterpart."""
    schema = schema_of(target)
    if schema is None or not schema.is_mutable or target is aten.batch_norm.default:
        return target
    packet, overload = target._schema.name.split("::")[1], target._overloadname
    if packet in _DRAWN:
        return _DRAWN[packet]
    name = packet.removesuffix("_")
    found = getattr(getattr(aten, name, None), overload, None) if name != packet else None
    if found is None or found._schema.is_mutable:
        raise UserError(f"{where}: the operator {target} writes in place and has no functional form.")
    return found


def drop_unread(graph: fx.Graph) -> None:
    """Remove what nothing reads, without asking whether the attributes it names are still there."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def reshape_views(graph: fx.Graph) -> None:
    """A view asks for a memory layout that an operator written out differently need not have."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def drop_no_ops(graph: fx.Graph) -> None:
    """Remove what changes nothing: ``x[:]`` and conversions to the dtype and device a tensor has already."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (_whole_slice(node) or _same_kind(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    bounds: list[Any] = [*node.args[2:], None, None, None]
    start, end, step = bounds[:3]
    return start in (0, None) and end in (None, 2**63 - 1) and step in (1, None)


def _same_kind(node: fx.Node) -> bool:
    if not str(node.target).startswith(("aten.to.", "aten.type_as.", "aten._to_copy.")):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return before.dtype == after.dtype and before.device == after.device


def decompose_attention(gm: fx.GraphModule) -> None:
    """Write every scaled_dot_product_attention out: softmax(q k^T * scale + mask) v (arXiv 1706.03762, eq. 1)."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is aten.scaled_dot_product_attention.default:
            _Attention(gm, node).replace()


class _Attention:
    """One attention node and the nodes that replace it."""

    _NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.node = gm, node
        given: dict[str, Any] = {**dict(zip(self._NAMES, node.args)), **node.kwargs}
        self.query, self.key, self.value = given["query"], given["key"], given["value"]
        self.mask, self.scale = given.get("attn_mask"), given.get("scale")
        self.dropout = float(given.get("dropout_p") or 0.0)
        self.causal, self.grouped = bool(given.get("is_causal")), bool(given.get("enable_gqa"))

    def replace(self) -> None:
        scale = self.scale if self.scale is not None else 1.0 / math.sqrt(self.query.meta["val"].shape[-1])
        with self.gm.graph.inserting_before(self.node):
            if self.grouped:
                self.key, self.value = self._repeated(self.key), self._repeated(self.value)
            keys = self._call(aten.transpose.int, (self.key, -2, -1))
            scores = self._call(aten.matmul.default, (self.query, keys))
            scores = self._masked(self._call(aten.mul.Tensor, (scores, scale)))
            weights = self._call(aten.softmax.int, (scores, -1))
            if self.dropout > 0.0:
                weights = self._dropped(weights)
            result = self._call(aten.matmul.default, (weights, self.value))
        self.node.replace_all_uses_with(result)
        self.gm.graph.erase_node(self.node)

    def _repeated(self, heads: fx.Node) -> fx.Node:
        """[B, H', S, E] with every head as often as the query has heads for it."""
        few, length, width = heads.meta["val"].shape[1:]
        times = self.query.meta["val"].shape[1] // few
        wide = self._call(aten.unsqueeze.default, (heads, 2))
        wide = self._call(aten.expand.default, (wide, [-1, few, times, -1, -1]))
        return self._call(aten.reshape.default, (wide, [-1, few * times, length, width]))

    def _causal(self, scores: fx.Node) -> fx.Node:
        """Scores with every key behind its query hidden; the mask is a constant of the graph."""
        rows, columns = scores.meta["val"].shape[-2:]
        if not isinstance(rows, int) or not isinstance(columns, int):
            raise UserError(f"module {self.node.meta['path']!r}: causal attention over a varying length.")
        name, mask = f"causal_{rows}_{columns}", torch.ones(rows, columns, dtype=torch.bool).tril().logical_not()
        holder = getattr(self.gm, HOLDER, None)
        if holder is None:
            holder = nn.Module()
            self.gm.add_module(HOLDER, holder)
        assert isinstance(holder, nn.Module)
        if not hasattr(holder, name):
            device = scores.meta["val"].device
            holder.register_buffer(name, mask.to(device), persistent=False)
        hidden = self.gm.graph.get_attr(f"{HOLDER}.{name}")
        fake = scores.meta["val"].fake_mode
        hidden.meta.update({"val": fake.from_tensor(mask), "path": self.node.meta["path"]})
        return self._call(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))

    def _masked(self, scores: fx.Node) -> fx.Node:
        if self.causal:
            scores = self._causal(scores)
        if self.mask is None or _keeps_everything(self.gm, self.mask):
            return scores
        if self.mask.meta["val"].dtype is not torch.bool:
            return self._call(aten.add.Tensor, (scores, self.mask))
        hidden = self._call(aten.logical_not.default, (self.mask,))
        return self._call(aten.masked_fill.Scalar, (scores, hidden, float("-inf")))

    def _dropped(self, weights: fx.Node) -> fx.Node:
        name = f"{HOLDER}.attention_dropout_{self.node.name}"
        self.gm.add_submodule(name, nn.Dropout(self.dropout))
        node = self.gm.graph.call_module(name, (weights,))
        node.meta.update(weights.meta)
        return node

    def _call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.gm.graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        fake = next(v.meta["val"] for v in args if isinstance(v, fx.Node))
        with fake.fake_mode:
            node.meta["val"] = target(*values)
        node.meta["path"] = self.node.meta["path"]
        return node


def _keeps_everything(gm: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether a mask that depends on shapes alone hides nothing (as transformers' ViT builds it)."""
    value = _constant_value(gm, mask, {})
    if not isinstance(value, torch.Tensor):
        return False
    return bool(value.all()) if value.dtype is torch.bool else not bool(value.any())


def _constant_value(gm: fx.GraphModule, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
    """The value of ``node`` when it does not depend on the input's values, else None."""
    if node in memo:
        return memo[node]
    if node.op != "call_function":
        return None
    if node.target is aten.sym_size.int:
        source, dim = node.args
        if isinstance(source, fx.Node) and source.op == "placeholder":
            size = source.meta["val"].shape[dim]
            return size if isinstance(size, int) else int(size.node.hint)
        return None
    values = {n: _constant_value(gm, n, memo) for n in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[misc]
    memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return memo[node]
