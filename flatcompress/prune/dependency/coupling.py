"""Reading torch-pruning's dependency graph into our own index space.

torch-pruning follows autograd's graph and answers, for one layer's output channels, which channels of which other
layers must go with them. Its answers are joined here over all layers (a union of channel "atoms"), so channels tied
only through a third layer end in one unit, and what stands in the way of a cut is kept as a reason.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.attention import Attention
from flatcompress.prune.dependency.recurrent import stood_in
from flatcompress.prune.inputs import Example, call, described, tensors_of

Atom = tuple[str, str, int]  # layer (or "!reason"), axis, channel


_ENDLESS = "the dependency graph cannot follow these channels to an end"
_PAIRS = 12  # (channel, root channel) per channel of the widest layer and node; 4 in networks that end
_VISITS = 5  # per node of the graph and root; below 1 in residual, dense, depthwise and transformer networks


class Link(NamedTuple):
    """Channel ``channels[i]`` of ``axis`` of ``name`` goes with output channel ``roots[i]`` of the group's root."""

    name: str
    axis: str
    channels: list[int]
    roots: list[int]


class Coupled(NamedTuple):
    """torch-pruning's answer for one root layer."""

    root: str
    links: list[Link]
    through: tuple[str, ...]


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """All parameters require gradients inside: the dependency graph follows autograd, frozen layers too."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class _Block(tp.pruner.BasePruningFunc):
    """An attention block as one opaque node: its inputs and its outputs are channels of the residual stream."""

    widths: dict[nn.Module, tuple[int, int]]

    def prune_out_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Any) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return self.widths[layer][1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return self.widths[layer][0]


def _opaque(model: nn.Module, blocks: list[Attention]) -> dict[type, _Block]:
    widths = {}
    for block in blocks:
        module = model.get_submodule(block.name)
        inside = block.output.startswith(f"{block.name}." if block.name else "")
        projection = model.get_submodule(block.output)
        first = model.get_submodule(block.inputs[0])
        assert isinstance(projection, nn.Linear) and isinstance(first, nn.Linear)
        widths[module] = (first.in_features, projection.out_features if inside else projection.in_features)
    pruner = _Block()
    pruner.widths = widths
    return {type(module): pruner for module in widths}


def call_counts(model: nn.Module, example_input: Example) -> Counter[str]:
    """How often each leaf module runs in one forward. UserError when the model does not run, or gives NaN."""
    counts: Counter[str] = Counter()
    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    hooks = [m.register_forward_hook(lambda *_, n=n: counts.update([n])) for n, m in leaves]
    try:
        with torch.no_grad(), evaluating(model):
            output = call(model, example_input)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the model does not run on the example input of shape {described(example_input)}: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if any(not bool(t.isfinite().all()) for t in tensors_of(output)):
        raise UserError(f"{type(model).__name__} gives NaN or infinity on the example input: no cut can be checked.")
    return counts


def _graph(
    model: nn.Module, example_input: Example, blocks: list[Attention], heard: list[Tensor]
) -> tp.DependencyGraph:
    def run(model: nn.Module, example: Any) -> list[Tensor]:
        heard.clear()
        return [t for t in tensors_of(call(model, example)) if t.grad_fn is not None] + heard

    try:
        with evaluating(model), _differentiable(model), _mapped_one_by_one(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(
                model, example_input, run, customized_pruners=_opaque(model, blocks) or None, verbose=False
            )
    except Exception as error:
        # The innermost function says which operation was being read, such as update_split_index_mapping.
        where = traceback.extract_tb(error.__traceback__)[-1].name
        raise UserError(
            f"the dependency graph of {type(model).__name__} cannot be read: {type(error).__name__} in {where}: {error}"
        ) from error


@contextmanager
def _mapped_one_by_one() -> Iterator[None]:
    """torch-pruning builds its index maps with `_map_channels` inside: its own loop ends at the first that fails."""
    maps = tp.dependency.index_mapping
    own, maps.update_index_mapping = maps.update_index_mapping, _map_channels
    try:
        yield
    finally:
        maps.update_index_mapping = own


def _map_channels(graph: tp.DependencyGraph) -> None:
    """torch-pruning's index maps, node by node: one that it cannot make stands in the way of its own channels alone."""
    maps, kinds = tp.dependency.index_mapping, tp.ops.OPTYPE
    makers = {
        kinds.CONCAT: maps.update_concat_index_mapping,
        kinds.SPLIT: maps.update_split_index_mapping,
        kinds.RESHAPE: maps.update_reshape_index_mapping,
        kinds.UNBIND: maps.update_unbind_index_mapping,
        kinds.EXPAND: maps.update_expand_index_mapping,
        kinds.SLICE: maps.update_slice_index_mapping,
    }
    for node in graph.module2node.values():
        try:
            makers.get(node.type, _no_map)(graph, node)
        except (ArithmeticError, LookupError, TypeError, AttributeError, ValueError):
            beside = [d for other in (*node.inputs, *node.outputs) for d in other.dependencies if d.target is node]
            for dependency in (*node.dependencies, *beside):
                dependency.index_mapping[0] = _no_channels


def _no_map(graph: tp.DependencyGraph, node: Any) -> None:
    """Most operations leave every channel where it is."""


def _no_channels(pairs: list[Any]) -> list[Any]:
    raise ValueError("it is not known where these channels go")


def _label(graph: tp.DependencyGraph, names: dict[nn.Module, str], module: Any) -> str | None:
    """The layer's name, "!reason" for what blocks a cut, or None for operations that hold no channels."""
    if module in names:
        return names[module]
    if isinstance(module, nn.Parameter):
        return f"!the free parameter {graph._param_to_name.get(module, '?')} has these channels too"
    if isinstance(module, tp.ops._OutputOp):
        return "!they leave the model: it is the output layer"
    return None


class _Reached(NamedTuple):
    """A node reached through one of its sides, and its channels that go: pairs with ``idx`` and ``root_idx``."""

    node: Any
    handler: Any
    pairs: set[Any]


def _reach(
    graph: tp.DependencyGraph, names: dict[nn.Module, str], root: nn.Module, widest: int
) -> tuple[list[_Reached], str | None]:
    """Every node that the root's output channels reach, channel by channel, and why the walk was given up, or None.

    torch-pruning's own walk compares whole index lists and does not end where its index maps shift channels on each
    round (focalnet). Here a pair (channel, root channel) is followed once, and channels that no layer can have, or
    nodes that are visited over and over, show that the maps run in circles. Where a layer mixes all of the root's
    channels (attention over channels) they are one unit: the walk, which would be cubic in the width, ends there.
    """
    pruner = graph.get_pruner_of_module(root)
    roots = pruner.get_out_channels(root)
    start = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(roots)]
    first = _Reached(graph.module2node[root], pruner.prune_out_channels, set(start))
    reached = {(id(first.node), first.handler): first}
    visits, limit = 0, _VISITS * len(graph.module2node)
    stack = [(first.node, first.handler, start)]
    while stack:
        node, handler, pairs = stack.pop()
        for dependency in node.dependencies:
            if not dependency.is_triggered_by(handler):
                continue
            key = (id(dependency.target), dependency.handler)
            at = reached.setdefault(key, _Reached(dependency.target, dependency.handler, set()))
            try:
                fresh = _fresh(dependency, pairs, at.pairs)
            except (IndexError, TypeError, AttributeError, ValueError):  # an index map that does not fit what arrives
                return list(reached.values()), _ENDLESS
            if not fresh:
                continue
            at.pairs.update(fresh)
            visits += 1
            if visits > limit or len(at.pairs) > _PAIRS * widest or _impossible(fresh, widest):
                return list(reached.values()), _ENDLESS
            if dependency.target.module in names and _all_in_one(at.pairs, roots):
                name = names[dependency.target.module]
                return list(reached.values()), f"{name} mixes all of these channels, so that they can only go together"
            stack.append((dependency.target, dependency.handler, fresh))
    return list(reached.values()), None


def _all_in_one(pairs: set[Any], roots: int) -> bool:
    """Do channels of the layer that carry several roots tie all ``roots`` of them together?"""
    by_channel: dict[int, set[int]] = {}
    for pair in pairs:
        by_channel.setdefault(pair.idx, set()).add(pair.root_idx)
    return roots > 1 and any(len(tied) == roots for tied in by_channel.values())


def _fresh(dependency: Any, pairs: list[Any], seen: set[Any]) -> list[Any]:
    """``pairs`` through the index maps of a dependency, without those that its target has ``seen``."""
    for mapping in dependency.index_mapping:
        if mapping is not None:
            pairs = mapping(pairs)
    return [pair for pair in dict.fromkeys(pairs) if pair not in seen]


def _impossible(pairs: list[Any], widest: int) -> bool:
    return any(pair.root_idx is None or not 0 <= pair.idx < 4 * widest for pair in pairs)


def _couple_one(graph: tp.DependencyGraph, names: dict[nn.Module, str], root: nn.Module, widest: int) -> Coupled:
    reached, stopped = _reach(graph, names, root, widest)
    channels = list(range(graph.get_pruner_of_module(root).get_out_channels(root)))
    links, through = [], []
    if stopped is not None:
        links.append(Link(f"!{stopped}", axes.OUT, channels, channels))
    for node, handler, pairs in reached:
        name = _label(graph, names, node.module)
        if name is None:
            operation = getattr(node, "grad_fn", None)
            through.append(operation.name() if operation is not None and hasattr(operation, "name") else "unknown")
            continue
        axis = axes.OUT if name.startswith("!") or graph.is_out_channel_pruning_fn(handler) else axes.IN
        ordered = sorted(pair for pair in pairs if pair.root_idx is not None)
        links.append(Link(name, axis, [p.idx for p in ordered], [p.root_idx for p in ordered]))
    return Coupled(names[root], links, tuple(dict.fromkeys(through)))


def couple(model: nn.Module, example_input: Example, blocks: list[Attention]) -> list[Coupled]:
    """The coupled channels of every convolution and linear layer outside the attention ``blocks``.

    UserError when the graph cannot be read: what failed is in the message, the model is as before.
    """
    with stood_in(model) as (readers, heard):
        graph = _graph(model, example_input, blocks, heard)
    names = {module: name for name, module in model.named_modules()} | readers
    if not any(module in names for module in graph.module2node):
        raise UserError(_unseen(model, example_input))
    layers = [module for module in names if isinstance(module, tp.ops.TORCH_CONV | tp.ops.TORCH_LINEAR)]
    widest = max((axes.width(module, axis) for module in layers for axis in (axes.IN, axes.OUT)), default=1)
    covered: set[str] = set()
    found = []
    for module in list(graph.module2node):
        if not isinstance(module, tp.ops.TORCH_CONV | tp.ops.TORCH_LINEAR) or names.get(module) in covered:
            continue
        if module in readers or module not in names:
            continue
        one = _couple_one(graph, names, module, widest)
        found.append(one)
        covered.update(k.name for k in one.links if k.axis == axes.OUT and _is_whole(model, k))
    return found


def _unseen(model: nn.Module, example_input: Example) -> str:
    with torch.no_grad(), evaluating(model):
        output = call(model, example_input)
    found = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    return (
        f"the dependency graph of {type(model).__name__} cannot be read: its output ({found}) has no gradient path to "
        "any layer. forward() must return logits that were not detached."
    )


def _is_whole(model: nn.Module, link: Link) -> bool:
    if link.name.startswith("!"):
        return False
    module = model.get_submodule(link.name)
    return axes.cuttable(module) and len(set(link.channels)) == axes.width(module, link.axis)
