"""Values in a traced graph that do not depend on the input: computed once, instead of at every call.

transformers models build attention masks from positions and the batch size. Such a value is the same for every
sample, so it is kept for one sample where its users broadcast, and an addition of zeros disappears.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from flatcompress.graph.rewrite import traced_shape

aten = torch.ops.aten
_BATCH = 3  # what the symbolic batch size is taken to be; anything above one shows which dimension follows it
_BROADCASTING = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
}


def fold_constants(gm: fx.GraphModule) -> None:
    """Replace every value that depends on nothing but shapes by a constant, in place."""
    known: dict[fx.Node, Any] = {}
    batched: set[fx.Node] = set()
    for node in gm.graph.nodes:
        _evaluate(gm, node, known, batched)
    for node, value in known.items():
        users = [user for user in node.users if user not in known]
        if node.op == "get_attr" or not users or not isinstance(value, Tensor):
            continue
        if node in batched:
            if (
                value.dim() == 0
                or value.shape[0] != _BATCH
                or not _broadcast(node, users)
                or (value != value[:1]).any()
            ):
                continue
            value = value[:1].clone()
        _replace(gm, node, value, users)
    gm.graph.eliminate_dead_code()


def _evaluate(gm: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], batched: set[fx.Node]) -> None:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        known[node] = getattr(gm.get_submodule(owner), name).detach()
    if node.op != "call_function":
        return
    if node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].op == "placeholder":  # type: ignore[union-attr]
        known[node] = _BATCH
        batched.add(node)
        return
    if all(source in known for source in node.all_input_nodes) and callable(node.target):
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[misc]
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
        if any(source in batched for source in node.all_input_nodes):
            batched.add(node)


def _broadcast(node: fx.Node, users: list[fx.Node]) -> bool:
    """Whether every user is an elementwise operator on another value of the same rank, which keeps the batch."""
    rank = len(node.meta["val"].shape)
    return all(
        user.target in _BROADCASTING
        and any(other is not node and _rank(other) == rank for other in user.all_input_nodes)
        for user in users
    )


def _rank(node: fx.Node) -> int:
    return len(traced_shape(node))


def _replace(gm: fx.GraphModule, node: fx.Node, value: Tensor, users: list[fx.Node]) -> None:
    if value.is_floating_point() and not value.any() and all(_is_addition(user) for user in users):
        for user in users:
            user.replace_all_uses_with(next(a for a in user.args if a is not node))  # type: ignore[arg-type]
            gm.graph.erase_node(user)
        return
    name = f"folded_{node.name}"
    gm.register_buffer(name, value)
    with gm.graph.inserting_before(node):
        made = gm.graph.get_attr(name)
    made.meta.update(node.meta)
    for user in users:
        user.replace_input_with(node, made)


def _is_addition(user: fx.Node) -> bool:
    """x + zeros of x's rank, with nothing else to it."""
    operands = user.args[:2]
    return (
        user.target is aten.add.Tensor
        and not user.kwargs
        and len(set(operands)) == 2
        and all(isinstance(operand, fx.Node) for operand in operands)
        and all(_rank(operand) == _rank(user) for operand in operands)  # type: ignore[arg-type]
    )
