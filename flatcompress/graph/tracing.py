"""`trace`: any exportable module as an fx graph over the module's own submodules.

torch.export flattens a model into aten operators on bare parameters. That is the right view for finding out where
tensors go, and the wrong one for training: BatchNorm and dropout are frozen in one mode, and the layers that a
quantizer would replace are gone. So the exported graph is *re-modularized*: an operator that is exactly what a
stock layer computes becomes a call of that layer again.

The training forward is traced first, because it shows dropout and the like. Where its graph, switched to eval mode,
is not the model's eval forward (a branch on ``self.training``), the eval forward is traced instead.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from flatcompress.errors import UserError
from flatcompress.graph import exported, noise, remembered, rewrite, still
from flatcompress.graph.interface import Interface, call, first_tensor, mapped, run_graph
from flatcompress.graph.remodularize import Remodularizer
from flatcompress.graph.runtime import HOLDER, installed_graph
from flatcompress.graph.wrapped import check_plain, initialise
from flatcompress.modules import modes_kept


def trace(model: nn.Module, example_input: Any) -> fx.GraphModule:
    """``model`` as an fx graph that may stand in for its forward.

    ``example_input``: a tensor [B, ...], a tuple of arguments or a dictionary of them (see `graph.interface`), on the
    model's device, any B >= 1; the graph works for every B. In the result

    - a conv, linear, BatchNorm, LayerNorm, GroupNorm, embedding or dropout layer is a ``call_module`` of that very
      submodule under its qualified name, so train() and eval() mean what they always mean; where the module does
      more than that layer (a BatchNorm with its activation), a stand-in on the same parameters lies under the name;
    - everything else is an aten ``call_function`` without in-place operators, free parameters are ``get_attr``;
    - scaled_dot_product_attention is written out as matmul, mul, softmax, matmul, so that its inputs are visible
      (rounding then differs from the fused kernel in the last bits; everything else is equal bit for bit);
    - what only the training forward does (dropout, stochastic depth) is a module that eval() turns off;
    - ``node.meta["val"]`` is a fake tensor (shape, dtype; the batch is symbolic, or the example's where nothing in
      the forward reads a size, see `still`), ``node.meta["path"]`` the module the node came from.

    The graph takes and returns tensors, one or a tuple of them; ``interface_of(gm.graph)`` knows the model's own
    arguments and result. It is compared with the model in eval mode on ``example_input`` before it is returned.
    UserError when the model cannot be exported, mutates its own buffers, or the comparison fails. What only the
    training forward does and a graph cannot is left out with a warning. A model that already runs a graph (see
    `install`) gives that graph.

    >>> gm = trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
    >>> [(n.op, str(n.target)) for n in gm.graph.nodes][1:-1]
    [('call_module', '0'), ('call_function', 'aten.relu.default')]
    """
    graph = installed_graph(model)
    if graph is not None:
        return fx.GraphModule(model, copy.deepcopy(graph))  # a copy: the caller may rewrite it
    check_plain(model)
    if first_tensor(example_input).shape[:1] == (1,):  # a batch of one would be baked in as a constant
        example_input = mapped(example_input, lambda t: torch.cat([t, t]) if t.shape[:1] == (1,) else t)
    initialise(model, example_input)
    with modes_kept(model):
        gm = _first_that_repeats(model, example_input)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in gm.named_modules():
        module.training = modes.get(name, model.training)
    return gm


def _first_that_repeats(model: nn.Module, example: Any) -> fx.GraphModule:
    """The graph of the training forward if eval() makes it the eval forward, else the graph of the eval forward."""
    watch = still.Watch()
    expected, key, problem = _eval_result(model, example, watch), remembered.key_of(model, example), ""
    known = remembered.find(key)
    if known is not None:
        gm = _again(model, example, expected, known)
        if gm is not None:
            return gm
        remembered.forget(key)
    try:
        found = _traced(model, example, training=True, without_symbols=watch.still)
        gm, problem = _repeating(found[0], example, expected)
        if gm is not None:
            remembered.remember(key, found[1])
            return gm
    except UserError as error:
        problem = f"the training forward cannot be traced ({str(error).rstrip('.')}); traced in eval mode, so what"
    gm, traced = _traced(model, example, training=False)
    if not _same(gm, example, expected):
        raise UserError(
            f"the traced graph of {type(model).__name__} does not repeat its eval forward: it depends on something "
            "else than its arguments (random numbers, global state, a counter)."
        )
    remembered.remember(key, replace(traced, problem=problem))
    _say(problem)
    return gm


def _say(problem: str) -> None:
    warnings.warn(f"{problem} only training does is left out of the graph.", stacklevel=4)


def _again(model: nn.Module, example: Any, expected: Any, known: remembered.Traced) -> fx.GraphModule | None:
    """The graph of a model like one that was traced before; None where it does not repeat this one's forward."""
    model.train(known.training)
    try:
        gm = _modular(model, known.program, known.interface)
        if known.training:
            return _repeating(gm, example, expected)[0]
        if not _same(gm, example, expected):
            return None
    except UserError:
        return None
    _say(known.problem)
    return gm


def _repeating(gm: fx.GraphModule, example: Any, expected: Any) -> tuple[fx.GraphModule | None, str]:
    """The training graph, noise gathered, if it repeats the eval forward; and what is wrong if not."""
    random = noise.random_nodes(gm.graph)
    if not random:
        told = "the training forward branches on self.training; traced in eval mode, so what"
        return (gm if _same(gm, example, expected) else None), told
    for scaled in (False, True):
        other = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        noise.gather(other, scaled)
        other.recompile()
        if not noise.random_nodes(other.graph) and _same(other, example, expected):
            return other, ""
    names = ", ".join(f"{n.meta.get('path') or 'forward'} ({n.target})" for n in random)
    return None, f"the training forward draws random numbers in {names}; traced in eval mode, so what"


def _eval_result(model: nn.Module, example: Any, watch: still.Watch) -> Any:
    model.eval()
    try:
        with torch.no_grad(), watch:
            return call(model, example)
    except UserError:
        raise
    except Exception as error:  # whatever the model's own forward raises
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
        raise UserError(f"{type(model).__name__} cannot be run on the example input ({what}).") from error


def _traced(
    model: nn.Module, example: Any, training: bool, without_symbols: bool = False
) -> tuple[fx.GraphModule, remembered.Traced]:
    """The graph of one mode, and what to remember of it."""
    program, interface = exported.export(model.train(training), example, without_symbols)
    kept = remembered.kept(program)
    return _modular(model, program, interface), remembered.Traced(kept, interface, training)


def _modular(
    model: nn.Module, program: torch.export.ExportedProgram | remembered.Program, interface: Interface
) -> fx.GraphModule:
    exported.normalise(program.graph)
    made = Remodularizer(model, program, interface)
    made.run()
    gm = fx.GraphModule(_root(model, made.extras, made.standins), made.graph)
    rewrite.decompose_attention(gm)
    rewrite.reshape_views(gm.graph)
    rewrite.drop_no_ops(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _root(model: nn.Module, extras: dict[str, Any], stands: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of ``model``'s tree, holding what the trace adds; the model itself is not touched."""
    root = _copied(model)
    for path, module in stands.items():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            child = owner._modules[parent]
            assert child is not None
            if not getattr(child, "_is_copy", False):
                child = owner._modules[parent] = _copied(child)
            owner = child
        owner._modules[name] = module
    if extras:
        if hasattr(model, HOLDER):
            raise UserError(f"the model has an attribute {HOLDER!r}, which the graph needs for itself: rename it.")
        holder = nn.Module()
        for name, value in extras.items():
            if isinstance(value, nn.Module):
                holder.add_module(name, value)
            else:
                holder.register_buffer(name, value.detach(), persistent=False)
        root.add_module(HOLDER, holder)
    return root


def _copied(module: nn.Module) -> nn.Module:
    stores = ("_modules", "_parameters", "_buffers")
    made = nn.Module()
    made.__dict__.update({k: v for k, v in vars(module).items() if k not in stores})
    for store in stores:
        setattr(made, store, dict(getattr(module, store)))
    made.__dict__["_is_copy"] = True
    return made


def _same(gm: fx.GraphModule, example: Any, expected: Any) -> bool:
    """Whether the graph in eval mode gives the same structure of the same values."""
    gm.eval()
    try:
        with torch.no_grad():
            found = run_graph(gm, example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the traced graph does not run: {type(error).__name__}: {str(error)[:300]}") from error
    a, first = pytree.tree_flatten(expected)
    b, second = pytree.tree_flatten(found)
    return first == second and all(_close(x, y) for x, y in zip(a, b))


def _close(expected: Any, found: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return not isinstance(found, torch.Tensor)
    if not isinstance(found, torch.Tensor) or expected.shape != found.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    finite = expected[torch.isfinite(expected)]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * max(scale, 1e-30), equal_nan=True)
