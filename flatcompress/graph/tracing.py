"""`trace`: any exportable module as an fx graph over the module's own submodules.

torch.export flattens a model into aten operators on bare parameters. That is the right view for finding out where
tensors go, and the wrong one for training: BatchNorm and dropout are frozen in one mode, and the layers that a
quantizer would replace are gone. So the exported graph is *re-modularized*: an operator that is exactly what a
stock layer computes becomes a call of that layer again.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph import rewrite
from flatcompress.graph.runtime import HOLDER, installed_graph
from flatcompress.modules import modes_kept

aten = torch.ops.aten

# operator -> the layers that may stand for it. Only stock forwards qualify: a subclass that does more in its
# forward than this one operator would do the rest twice.
_LAYERS: dict[Any, tuple[type[nn.Module], ...]] = {
    aten.conv1d.default: (nn.Conv1d,),
    aten.conv1d.padding: (nn.Conv1d,),
    aten.conv2d.default: (nn.Conv2d,),
    aten.conv2d.padding: (nn.Conv2d,),
    aten.linear.default: (nn.Linear,),
    aten.batch_norm.default: (nn.BatchNorm1d, nn.BatchNorm2d),
    aten.layer_norm.default: (nn.LayerNorm,),
    aten.group_norm.default: (nn.GroupNorm,),
    aten.embedding.default: (nn.Embedding,),
    aten.dropout.default: (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    aten.feature_dropout.default: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}
_WEIGHT_ARG = {
    aten.batch_norm.default: 1,
    aten.layer_norm.default: 2,
    aten.group_norm.default: 2,
    aten.embedding.default: 0,
}
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


def trace(model: nn.Module, example_input: torch.Tensor) -> fx.GraphModule:
    """``model`` as an fx graph that may stand in for its forward.

    ``example_input``: [B, ...] on the model's device, any B >= 1; the graph works for every B. In the result

    - a conv, linear, BatchNorm, LayerNorm, GroupNorm, embedding or dropout layer is a ``call_module`` of that very
      submodule under its qualified name, so train() and eval() mean what they always mean;
    - everything else is an aten ``call_function`` without in-place operators, free parameters are ``get_attr``;
    - scaled_dot_product_attention is written out as matmul, mul, softmax, matmul, so that its inputs are visible
      (rounding then differs from the fused kernel in the last bits; everything else is equal bit for bit);
    - ``node.meta["val"]`` is a fake tensor (shape, dtype; the batch is symbolic), ``node.meta["path"]`` the module
      the node came from.

    The graph is compared with the model in eval mode on ``example_input`` before it is returned. UserError when the
    model cannot be exported, mutates its own buffers, does not return one tensor, or the comparison fails.
    A model that already runs a graph (see `install`) gives that graph.

    >>> gm = trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(1, 4))
    >>> [(n.op, str(n.target)) for n in gm.graph.nodes][1:-1]
    [('call_module', '0'), ('call_function', 'aten.relu.default')]
    """
    graph = installed_graph(model)
    if graph is not None:
        return fx.GraphModule(model, copy.deepcopy(graph))  # a copy: the caller may rewrite it
    if example_input.shape[0] < 2:  # a batch of one would be baked in as a constant
        example_input = torch.cat([example_input, example_input])
    with modes_kept(model):
        gm = _traced(model, example_input, training=True)
        random = _random_nodes(gm)
        if random:
            warnings.warn(
                f"the training forward draws random numbers in {', '.join(random)}; traced in eval mode, so these "
                "are left out of the graph.",
                stacklevel=2,
            )
            gm = _traced(model, example_input, training=False)
        _check_same(model, gm, example_input)
    return gm


def _traced(model: nn.Module, example_input: torch.Tensor, training: bool) -> fx.GraphModule:
    program = _export(model.train(training), example_input)
    graph, extras = _Remodularizer(model, program).run()
    root = _root(model, extras)
    gm = fx.GraphModule(root, graph)
    rewrite.decompose_attention(gm, example_input)
    rewrite.drop_no_ops(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


@contextmanager
def _with_momentum(model: nn.Module) -> Iterator[None]:
    """Norms that average all batches alike (momentum None) count them in a tensor, which torch.export cannot follow."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    try:
        for norm in norms:
            norm.momentum = 0.1
        yield
    finally:
        for norm in norms:
            norm.momentum = None


def _export(model: nn.Module, example_input: torch.Tensor) -> torch.export.ExportedProgram:
    # Before torch 2.7 the training graph had its own entry point.
    export = torch.export.export
    if tuple(int(v) for v in re.findall(r"\d+", torch.__version__)[:2]) < (2, 7):
        export = torch.export.export_for_training  # type: ignore[attr-defined]
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a traceback of what is raised below anyway
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with _with_momentum(model):
            return export(model, (example_input,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    except Exception as error:  # torch.export raises whatever it meets on its way
        name = type(model).__name__
        raise UserError(f"{name} cannot be traced by torch.export: {_reason(error)}") from error
    finally:
        log.setLevel(level)


def _reason(error: BaseException) -> str:
    """The lines of an export error that name the operator or the user's code, without the advice around them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File ") and "site-packages" not in line]
    head = lines[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {head[:400]}" + (f" ({frames[-1]})" if frames else "")


def _root(model: nn.Module, extras: dict[str, Any]) -> nn.Module:
    """A shallow copy of ``model``'s tree root, holding what the trace adds; the model itself is not touched."""
    root = nn.Module()
    root.__dict__.update({k: v for k, v in vars(model).items() if k not in ("_modules", "_parameters", "_buffers")})
    for store in ("_modules", "_parameters", "_buffers"):
        setattr(root, store, dict(getattr(model, store)))
    if extras:
        if hasattr(model, HOLDER):
            raise UserError(f"the model has an attribute {HOLDER!r}, which the graph needs for itself: rename it.")
        holder = nn.Module()
        for name, value in extras.items():
            if isinstance(value, nn.Module):
                holder.add_module(name, value)
            else:
                holder.register_buffer(name, value, persistent=False)
        root.add_module(HOLDER, holder)
    return root


class _Remodularizer:
    """Copies an exported program's graph node by node into one that calls the model's own layers."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model, self.program = model, program
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.extras: dict[str, Any] = {}
        signature = program.graph_signature
        self.state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = signature.inputs_to_lifted_tensor_constants

    def run(self) -> tuple[fx.Graph, dict[str, Any]]:
        for node in self.program.graph.nodes:
            getattr(self, f"_{node.op}")(node)
        return self.graph, self.extras

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.state:
            self._emit(node, self.graph.get_attr(self.state[node.name]))
        elif node.name in self.constants:
            name = f"constant_{len(self.extras)}"
            self.extras[name] = self.program.constants[self.constants[node.name]]
            self._emit(node, self.graph.get_attr(f"{HOLDER}.{name}"))
        else:
            self._emit(node, self.graph.placeholder(node.name))

    def _get_attr(self, node: fx.Node) -> None:
        raise UserError(
            f"{_where(node)}: a nested graph ({node.target}), as a no_grad or autocast block or a control-flow "
            "operator in the forward makes it, is not supported."
        )

    def _output(self, node: fx.Node) -> None:
        outputs = node.args[0]
        if not isinstance(outputs, list | tuple) or len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
            raise UserError(f"{type(self.model).__name__} must return one tensor; it returns {outputs!r}.")
        self.graph.output(self.env[outputs[0]])

    def _call_function(self, node: fx.Node) -> None:
        if self._mutates_state(node) or rewrite.is_guard(node):
            return
        target = rewrite.functional(node.target, _where(node))
        layer = self._layer(node, target)
        if layer is not None:
            path, source = layer
            self._emit(node, self.graph.call_module(path, (self.env[source],)))
        elif target in _DROPOUTS:
            self._free_dropout(node)
        else:
            args = fx.map_arg(node.args, self.env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, self.env.__getitem__)
            self._emit(node, self.graph.call_function(target, args, kwargs))

    def _mutates_state(self, node: fx.Node) -> bool:
        """True for BatchNorm's step counter (the layer counts by itself); UserError for any other written buffer."""
        written = rewrite.written_argument(node)
        if written is None or written.name not in self.state:
            return False
        name = self.state[written.name]
        if name.endswith("num_batches_tracked"):
            return True
        raise UserError(f"{_where(node)}: the forward writes to {name!r} ({node.target}), which a graph cannot repeat.")

    def _layer(self, node: fx.Node, target: Any) -> tuple[str, fx.Node] | None:
        """The stock layer that ``node`` is, and the node that feeds it; None when it is no layer."""
        kinds = _LAYERS.get(target)
        path = _path(node)
        if kinds is None or not path:
            return None
        module = self.model.get_submodule(path)
        if not _is_stock(module, kinds) or not self._owns(module, node, target):
            return None
        source = node.args[1] if target is aten.embedding.default else node.args[0]
        if getattr(module, "padding_mode", "zeros") != "zeros":  # the layer pads by itself: its input is the pad's
            assert isinstance(source, fx.Node)
            source = source.args[0]
        assert isinstance(source, fx.Node)
        return path, source

    def _owns(self, module: nn.Module, node: fx.Node, target: Any) -> bool:
        """Whether the operator's weight is ``module``'s own, not one derived from it (weight norm, LoRA)."""
        if target in _DROPOUTS:
            return True
        weight = getattr(module, "weight", None)
        index = _WEIGHT_ARG.get(target, 1)
        found = node.args[index] if len(node.args) > index else None
        if weight is None:
            return found is None
        if not isinstance(found, fx.Node) or found.name not in self.state:
            return False
        owner, _, name = self.state[found.name].rpartition(".")
        return getattr(self.model.get_submodule(owner), name) is weight

    def _free_dropout(self, node: fx.Node) -> None:
        """F.dropout in some forward: a module of its own, so that eval() turns it off."""
        source, p = node.args[0], float(node.args[1])  # type: ignore[arg-type]
        assert isinstance(source, fx.Node)
        if p == 0.0:
            self.env[node] = self.env[source]
            return
        name = f"dropout_{len(self.extras)}"
        self.extras[name] = nn.Dropout(p)
        self._emit(node, self.graph.call_module(f"{HOLDER}.{name}", (self.env[source],)))

    def _emit(self, old: fx.Node, new: fx.Node) -> None:
        new.meta["val"] = old.meta.get("val")
        new.meta["path"] = _path(old)
        self.env[old] = new


def _is_stock(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    forwards = {kind.forward for kind in kinds}
    return isinstance(module, kinds) and type(module).forward in forwards and "forward" not in vars(module)


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # the second call of a shared module is called path@1
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)


def _where(node: fx.Node) -> str:
    return f"module {_path(node)!r}" if _path(node) else "the model's forward"


def _random_nodes(gm: fx.GraphModule) -> list[str]:
    tag = torch.Tag.nondeterministic_seeded
    return [
        f"{n.meta['path'] or 'forward'} ({n.target})"
        for n in gm.graph.nodes
        if n.op == "call_function" and tag in getattr(n.target, "tags", ())
    ]


def _check_same(model: nn.Module, gm: fx.GraphModule, example_input: torch.Tensor) -> None:
    """The graph against the model, both in eval mode: in-place writes through views are the usual culprit."""
    model.eval()
    gm.eval()
    with torch.no_grad():
        expected, found = model(example_input), gm(example_input)
    if not isinstance(expected, torch.Tensor):
        raise UserError(f"{type(model).__name__} must return one tensor; it returns {type(expected).__name__}.")
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5 * max(scale, 1e-30), equal_nan=True):
        raise UserError(
            f"the traced graph of {type(model).__name__} does not repeat its eval forward: a branch on "
            "self.training or an in-place write through a view cannot be traced."
        )
