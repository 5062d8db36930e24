"""An exported program's graph, node by node, as one that calls the model's own layers.

An operator that is exactly what a layer of the model computes becomes a call of that layer: of the module itself when
its forward is the stock one, of a stand-in for it (see `standins`) when the forward does more than this operator.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph import rewrite, standins
from flatcompress.graph.exported import block_parts, is_block
from flatcompress.graph.interface import KEY, Interface
from flatcompress.graph.remembered import Program
from flatcompress.graph.runtime import HOLDER
from flatcompress.modules import pads_with_zeros

aten = torch.ops.aten
# operator -> the layers that may stand for it
LAYERS: dict[Any, tuple[type[nn.Module], ...]] = {
    aten.conv1d.default: (nn.Conv1d,),
    aten.conv1d.padding: (nn.Conv1d,),
    aten.conv2d.default: (nn.Conv2d,),
    aten.conv2d.padding: (nn.Conv2d,),
    aten.conv3d.default: (nn.Conv3d,),
    aten.conv3d.padding: (nn.Conv3d,),
    aten.conv_transpose1d.default: (nn.ConvTranspose1d,),
    aten.conv_transpose2d.input: (nn.ConvTranspose2d,),
    aten.conv_transpose3d.input: (nn.ConvTranspose3d,),
    aten.linear.default: (nn.Linear,),
    aten.batch_norm.default: (nn.modules.batchnorm._BatchNorm,),
    aten.layer_norm.default: (nn.LayerNorm,),
    aten.group_norm.default: (nn.GroupNorm,),
    aten.embedding.default: (nn.Embedding,),
    aten.dropout.default: (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    aten.feature_dropout.default: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}
PRODUCTS = frozenset(target for target in LAYERS if standins.layer_kind(target) is not None)
_WEIGHT_ARG = {
    aten.batch_norm.default: 1,
    aten.layer_norm.default: 2,
    aten.group_norm.default: 2,
    aten.embedding.default: 0,
}
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)
_NOISES = (aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
_STOCK_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def path_of(node: fx.Node) -> str:
    """The qualified name of the innermost module a node was traced in; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # the second call of a shared module is called path@1
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)


def where(node: fx.Node) -> str:
    """That module, for messages."""
    return f"module {path_of(node)!r}" if path_of(node) else "the model's forward"


class Remodularizer:
    """One pass over a program; ``graph``, ``extras`` (by name in the holder) and ``standins`` (by path) come out."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram | Program, interface: Interface) -> None:
        self.model, self.program, self.interface = model, program, interface
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.same: dict[fx.Node, list[fx.Node]] = {}  # nodes that are one tensor under several names
        self.counted: set[fx.Node | None] = set()
        self.extras: dict[str, Any] = {}
        self.standins: dict[str, nn.Module] = {}
        signature = program.graph_signature
        self.state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = signature.inputs_to_lifted_tensor_constants
        self.modules = dict(model.named_modules(remove_duplicate=False))
        names = {id(module): name for name, module in model.named_modules()}
        self.first = {name: names[id(module)] for name, module in self.modules.items()}  # of a shared layer's paths

    def run(self) -> None:
        """Fill ``graph``."""
        for node in self.program.graph.nodes:
            self._node(node)

    def _node(self, node: fx.Node) -> None:
        getattr(self, f"_{node.op}")(node)

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.state:
            self._emit(node, self.graph.get_attr(self.state[node.name]))
        elif node.name in self.constants:
            self._emit(node, self._constant(self.program.constants[self.constants[node.name]]))
        elif node.name in self.interface.names:
            self._emit(node, self.graph.placeholder(node.name))
        else:
            self.env[node] = None  # an argument that is no tensor: its value is part of the graph

    def _constant(self, value: Any) -> fx.Node:
        name = f"constant_{len(self.extras)}"
        self.extras[name] = value
        return self.graph.get_attr(f"{HOLDER}.{name}")

    def _get_attr(self, node: fx.Node) -> None:
        if any(is_block(user) for user in node.users):
            return
        raise UserError(
            f"{where(node)}: a nested graph ({node.target}), as a control-flow operator in the forward makes it, is "
            "not supported."
        )

    def _output(self, node: fx.Node) -> None:
        outputs = self._user_outputs(node)
        found = fx.map_arg(outputs, self.env.__getitem__)
        if not any(isinstance(o, fx.Node) for o in found):
            raise UserError(f"{type(self.model).__name__} must return tensors; it returns {outputs!r}.")
        single = len(found) == 1 and self.interface.simple
        made = self.graph.output(found[0] if single or len(found) == 1 else tuple(found))
        made.meta[KEY] = self.interface

    def _user_outputs(self, node: fx.Node) -> list[Any]:
        outputs: Any = node.args[0]
        outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        specs = self.program.graph_signature.output_specs
        return [o for o, spec in zip(outputs, specs) if spec.kind.name == "USER_OUTPUT"]

    def _call_function(self, node: fx.Node) -> None:
        if self._mutates_state(node) or rewrite.is_guard(node):
            return
        if is_block(node):
            self._block(node)
            return
        if node.target is operator.getitem:
            picked: Any = node.args[0]
            if not isinstance(self.env[picked], fx.Node):  # of a block's results
                self.env[node] = self.env[picked][node.args[1]]
                return
        target = rewrite.functional(node.target, where(node))
        made = self._made(node, target)
        written = rewrite.written_argument(node)
        if written is not None and written.name not in self.state:
            self._rename(written, node, made)

    def _made(self, node: fx.Node, target: Any) -> fx.Node:
        found = self._layer(node, target)
        if found is not None:
            path, source = found
            return self._emit(node, self.graph.call_module(self.first.get(path, path), (self.env[source],)))
        if target in _DROPOUTS or target in _NOISES:
            return self._dropout(node, target)
        args = fx.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.env.__getitem__)
        return self._emit(node, self.graph.call_function(target, args, kwargs))

    def _rename(self, written: fx.Node, node: fx.Node, made: fx.Node) -> None:
        """After an in-place operator every name of the tensor means its result."""
        names = self.same.setdefault(written, [written])
        names.append(node)
        self.same[node] = names
        for name in names:
            self.env[name] = made

    def _block(self, node: fx.Node) -> None:
        """The nodes of a no_grad or autocast block, in line; where gradients stop, its results are detached."""
        nested, arguments, stops = block_parts(node, self.program)
        inputs = iter(arguments)
        for inner in nested.graph.nodes:
            if inner.op == "placeholder":
                given = next(inputs)
                self.env[inner] = self.env[given] if isinstance(given, fx.Node) else given
            elif inner.op == "output":
                found = fx.map_arg(inner.args[0], self.env.__getitem__)
                self.env[node] = [self._detached(f, stops) for f in found]  # type: ignore[union-attr]
            else:
                self._node(inner)

    def _detached(self, made: Any, stops: bool) -> Any:
        if not stops or not isinstance(made, fx.Node):
            return made
        stopped = self.graph.call_function(aten.detach.default, (made,))
        stopped.meta.update(made.meta)
        return stopped

    def _mutates_state(self, node: fx.Node) -> bool:
        """True for BatchNorm's step counter (the layer counts by itself); UserError for any other written buffer."""
        written = rewrite.written_argument(node)
        if written in self.counted:  # the same counter once more
            self.counted.add(node)
            return True
        if written is None or written.name not in self.state:
            return False
        name = self.state[written.name]
        if name.endswith("num_batches_tracked"):
            self.counted.add(node)
            return True
        raise UserError(f"{where(node)}: the forward writes to {name!r} ({node.target}), which a graph cannot repeat.")

    # -- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, target: Any) -> tuple[str, fx.Node] | None:
        """The path of the layer that ``node`` is, and the node that feeds it; None when it is no layer."""
        kinds = LAYERS.get(target)
        if kinds is None:
            return None
        path = path_of(node)
        module = self.modules.get(path) if path else None
        if module is not None and _is_stock(module, kinds) and self._owns(module, node, target):
            return self._source(path, module, node, target)
        if target is aten.batch_norm.default:
            return self._norm(node)
        if target in PRODUCTS:
            return self._product(node, target)
        return None

    def _source(self, path: str, module: nn.Module, node: fx.Node, target: Any) -> tuple[str, fx.Node]:
        source = node.args[1] if target is aten.embedding.default else node.args[0]
        if not pads_with_zeros(module):  # the layer pads by itself: its input is the pad's
            assert isinstance(source, fx.Node)
            source = source.args[0]
        assert isinstance(source, fx.Node)
        if target is aten.batch_norm.default and type(module) not in _STOCK_NORMS:  # SyncBatchNorm
            kind = standins.norm_kind(len(node.meta["val"].shape))
            assert kind is not None
            made = standins.synchronised(kind) if isinstance(module, nn.SyncBatchNorm) else kind
            self._stand_in(path, module, made, {})
        return path, source

    def _owns(self, module: nn.Module, node: fx.Node, target: Any) -> bool:
        """Whether the operator's weight is ``module``'s own, not one derived from it (weight norm, LoRA)."""
        if target in _DROPOUTS:
            return True
        index = _WEIGHT_ARG.get(target, 1)
        own = module._parameters.get("weight")  # not the attribute: a parametrization would compute it
        return self._is(node.args[index] if len(node.args) > index else None, own)

    def _is(self, node: Any, tensor: torch.Tensor | None) -> bool:
        """Whether a node is this very parameter or buffer; or both are None."""
        if tensor is None or node is None:
            return tensor is None and node is None
        return self._tensor(node) is tensor

    def _tensor(self, node: Any) -> torch.Tensor | None:
        """The parameter or buffer that a node is, else None."""
        name = self.state.get(node.name) if isinstance(node, fx.Node) else None
        if name is None:
            return None
        owner, _, attribute = name.rpartition(".")
        return getattr(self.modules[owner], attribute)

    def _product(self, node: fx.Node, target: Any) -> tuple[str, fx.Node] | None:
        """A convolution or linear operator on some module's own weight and bias, whatever its forward does besides."""
        kind = standins.layer_kind(target)
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        tensor = self._tensor(weight)
        if kind is None or tensor is None or node.kwargs:
            return None
        attributes = standins.layer_attributes(target, list(node.args), tensor, bias is not None)
        for path in self._candidates(node, weight):
            module = self.modules[path]
            own = module._parameters
            fits = isinstance(module, kind) and self._is(weight, own.get("weight")) and self._is(bias, own.get("bias"))
            if fits and path and self._can_be(path, module, kind, attributes):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                return path, source
        return None

    def _candidates(self, node: fx.Node, weight: Any) -> list[str]:
        """The module the node was traced in, then every owner of the weight."""
        tensor = self._tensor(weight)
        owners = [p for p, m in self.modules.items() if tensor is not None and m._parameters.get("weight") is tensor]
        inner = path_of(node)
        return [inner, *owners] if inner in self.modules else owners

    def _can_be(self, path: str, module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> bool:
        """Whether the layer at ``path`` computes the operator: by its own forward, or by a stand-in made here."""
        known = self.standins.get(self.first[path])
        if known is not None:
            return _agrees(known, attributes)
        if _is_stock(module, (kind,)) and pads_with_zeros(module):
            return _agrees(module, attributes)
        if _is_stock(module, (kind,)):
            return False  # it pads by itself when called as a module, which this call did not
        self._stand_in(path, module, kind, attributes)
        return True

    def _stand_in(self, path: str, module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
        self.standins.setdefault(self.first[path], standins.stand_in(module, kind, attributes))

    def _norm(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        """A batch normalization by hand, or inside a layer that does more."""
        source, weight, bias, mean, variance, _, momentum, eps = node.args[:8]
        kind = standins.norm_kind(len(source.meta["val"].shape))  # type: ignore[union-attr]
        tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
        owners = {k: self._owner(v) for k, v in tensors.items() if v is not None}
        if kind is None or any(o is None for o in owners.values()) or not owners:
            return None
        path = path_of(node)
        for candidate in (path, next(iter(owners.values()))[0]):  # type: ignore[index]
            module = self.modules.get(candidate)
            own = all(o == (candidate, k) for k, o in owners.items())
            if own and isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._stand_in(candidate, module, kind, {"eps": float(eps)})  # type: ignore[arg-type]
                return candidate, source  # type: ignore[return-value]
        parts = {k: (self.modules[o[0]], o[1]) for k, o in owners.items() if o}
        some = next(t for t in (self._tensor(v) for v in tensors.values()) if t is not None)
        name = f"batch_norm_{len(self.extras)}"
        self.extras[name] = standins.BorrowedBatchNorm(
            {k: parts.get(k) for k in tensors}, some.shape[0], float(momentum), float(eps)  # type: ignore[arg-type]
        )  # fmt: skip
        return f"{HOLDER}.{name}", source  # type: ignore[return-value]

    def _owner(self, node: Any) -> tuple[str, str] | None:
        name = self.state.get(node.name) if isinstance(node, fx.Node) else None
        owner, _, attribute = (name or "").rpartition(".")
        return (owner, attribute) if name else None

    def _dropout(self, node: fx.Node, target: Any) -> fx.Node:
        """F.dropout in some forward: a module of its own, so that eval() turns it off."""
        source, p = node.args[0], float(node.args[1])  # type: ignore[arg-type]
        assert isinstance(source, fx.Node)
        if p == 0.0:
            self.env[node] = self.env[source]
            return self.env[source]
        name = f"dropout_{len(self.extras)}"
        module: nn.Module = nn.Dropout(p)
        if target is not aten.dropout.default:
            module = standins.TrainingNoise(standins.Operator(target, p, True))
        self.extras[name] = module
        return self._emit(node, self.graph.call_module(f"{HOLDER}.{name}", (self.env[source],)))

    def _emit(self, old: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["val"] = old.meta.get("val")
        new.meta["path"] = path_of(old)
        self.env[old] = new
        return new


def _is_stock(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    forwards = {kind.forward for kind in kinds}
    if nn.modules.batchnorm._BatchNorm in kinds:
        forwards.add(nn.SyncBatchNorm.forward)
    return isinstance(module, kinds) and type(module).forward in forwards and "forward" not in vars(module)


def _agrees(module: nn.Module, attributes: dict[str, Any]) -> bool:
    keys = ("stride", "padding", "dilation", "groups", "output_padding")
    return all(getattr(module, k, None) == attributes[k] for k in keys if k in attributes)
