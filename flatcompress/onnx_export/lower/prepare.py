"""Rewrites of the traced graph that make the integer structure visible before it is lowered.

All of them keep the model's function: identities are dropped, BatchNorms are noted at the convolution they fold
into, quantizers move in front of operators that only rearrange or select values (rounding commutes with those),
and clamps right before a quantizer become limits of its grid (rounding is monotone).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from flatcompress.graph.rewrite import first_input, traced_shape
from flatcompress.modules import weight_of
from flatcompress.onnx_export.lower.constants import fold_constants

aten = torch.ops.aten
INF = float("inf")

IDENTITIES = {
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.lift_fresh_copy.default,
}
# Operators that give back some of the values they get: they work on codes as they do on real values.
MOVES = {
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.unflatten.int,
    aten.movedim.int,
    aten.index_select.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    operator.getitem,
    aten.max_pool2d.default,
    aten.max_pool1d.default,
    aten.channel_shuffle.default,
    aten.pixel_shuffle.default,
}
# Of these, the ones a quantizer may cross: one tensor in, one tensor out.
_CROSSABLE = MOVES - {
    operator.getitem,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
}
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module a ``call_module`` node calls, else None."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_quantizer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls an activation quantizer."""
    return hasattr(module_of(gm, node), "activation_spec")


def is_weighted(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node calls a convolution or linear layer, quantized or not."""
    module = module_of(gm, node)
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) or hasattr(module, "weight_spec")


def prepare(gm: fx.GraphModule) -> None:
    """All rewrites, in place. Results stand in ``meta``: "norms" of a layer, "low" and "high" of a quantizer, and
    "quantized_by" of an operator whose result is what a quantizer that moved gave in its old place.
    """
    fold_constants(gm)
    _drop_identities(gm)
    _note_norms(gm)
    changed = True
    while changed:
        changed = _merge_clamps(gm) or _hoist_quantizers(gm)
    _note_pads(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()


def _remove(gm: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(first_input(node))
    gm.graph.erase_node(node)


def _drop_identities(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if isinstance(module_of(gm, node), _DROPOUTS) or _is_identity(node):
            _remove(gm, node)


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _CASTS:
        return node.meta["val"].dtype == first_input(node).meta["val"].dtype
    pads = zero_pads(node)
    return node.target in IDENTITIES or (pads is not None and not any(pads))


def zero_pads(node: fx.Node) -> list[int] | None:
    """The amounts of a padding with zeros (torch's order: last dimension first), else None."""
    if node.op != "call_function" or node.target not in PADS:
        return None
    given = [*node.args[2:], *node.kwargs.values()]
    if any(value not in ("constant", None, 0, 0.0) for value in given):
        return None
    return [int(amount) for amount in node.args[1]]  # type: ignore[union-attr, arg-type]


def _note_pads(gm: fx.GraphModule) -> None:
    """A padding with zeros of height and width before integer convolutions becomes their own."""
    for node in list(gm.graph.nodes):
        pads = zero_pads(node)
        if pads is None or min(pads) < 0 or not all(_pads_itself(gm, user, pads) for user in node.users):
            continue
        for user in node.users:
            user.meta["pads"] = pads
        _remove(gm, node)


def _pads_itself(gm: fx.GraphModule, user: fx.Node, pads: list[int]) -> bool:
    module = module_of(gm, user)
    rank = getattr(module, "weight", torch.empty(0)).dim()
    zeros = getattr(module, "padding_mode", "") == "zeros" and not isinstance(getattr(module, "padding", ""), str)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return False
    return hasattr(module, "weight_spec") and zeros and len(pads) <= 2 * (rank - 2)


def _note_norms(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if not isinstance(module_of(gm, node), nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            continue
        layer = first_input(node)  # one call of it: another call may have another norm, or none
        # A linear layer's BatchNorm1d on [B, T, C] normalises T.
        if is_weighted(gm, layer) and len(layer.users) == 1 and not _normalises_tokens(gm, layer):
            layer.meta.setdefault("norms", []).append(module_of(gm, node))
            _remove(gm, node)


def _normalises_tokens(gm: fx.GraphModule, layer: fx.Node) -> bool:
    weight = weight_of(module_of(gm, layer))
    return weight is not None and weight.dim() == 2 and len(traced_shape(layer)) > 2


def _merge_clamps(gm: fx.GraphModule) -> bool:
    changed = False
    for node in gm.graph.nodes:
        if not is_quantizer(gm, node):
            continue
        bounds = clamp_bounds(first_input(node))
        if bounds is None or len(first_input(node).users) > 1:
            continue
        # The clamp noted before acts on this one's result, so it limits this one's limits.
        low, high = node.meta.get("low", -INF), node.meta.get("high", INF)
        node.meta["low"] = min(max(bounds[0], low), high)
        node.meta["high"] = max(min(bounds[1], high), low)
        _remove(gm, first_input(node))
        changed = True
    return changed


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a clamp with constant limits, else None."""
    if node.op != "call_function":
        return None
    given: dict[str, Any] = {**dict(zip(("self", "min", "max"), node.args)), **node.kwargs}
    low, high = given.get("min"), given.get("max")
    if node.target is aten.relu.default:
        return 0.0, INF
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        given = {**dict(zip(("self", "min_val", "max_val"), node.args)), **node.kwargs}
        return float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))
    if node.target is aten.clamp.default:
        return (-INF if low is None else float(low)), (INF if high is None else float(high))
    if node.target is aten.clamp_min.default:
        return float(node.args[1]), INF  # type: ignore[arg-type]
    return None


def _hoist_quantizers(gm: fx.GraphModule) -> bool:
    for node in gm.graph.nodes:
        if not is_quantizer(gm, node):
            continue
        move = first_input(node)
        crossable = move.target in _CROSSABLE or zero_pads(move) is not None
        if move.op == "call_function" and crossable and len(move.users) == 1:
            _swap(gm, move, node)
            return True
    return False


def _swap(gm: fx.GraphModule, move: fx.Node, quantizer: fx.Node) -> None:
    """``quantizer(move(x))`` -> ``move(quantizer(x))``."""
    with gm.graph.inserting_before(move):
        early = gm.graph.call_module(str(quantizer.target), (first_input(move),))
    early.meta.update({**quantizer.meta, "val": first_input(move).meta.get("val"), "moved": True})
    if not quantizer.meta.get("moved"):
        move.meta["quantized_by"] = str(quantizer.target)
    quantizer.replace_all_uses_with(move)
    gm.graph.erase_node(quantizer)
    move.replace_input_with(first_input(move), early)
