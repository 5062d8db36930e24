"""Operators on weights that no layer owns, made layers: what a quantizer can be put into.

Weight norm, spectral norm and weight standardisation compute a convolution's weight at every call; attention projects
with a bare parameter; some forwards keep their layers out of the model's tree. For each convolution or linear operator
whose weight does not depend on the input, `make_plain` puts a plain layer under the module it was traced in and lets
the graph call it. A computed weight is *materialised*: its value in eval mode becomes the parameter, and what computed
it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from flatcompress.graph import rewrite, standins
from flatcompress.graph.remodularize import PRODUCTS
from flatcompress.graph.runtime import HOLDER


@dataclass
class _Product:
    """One operator, its arguments, where it was traced, and the values of its weight and bias."""

    node: fx.Node
    args: tuple[Any, ...]
    path: str
    weight: Tensor
    bias: Tensor | None


def depends_on_input(node: Any, memo: dict[fx.Node, bool]) -> bool:
    """Whether a value in the graph follows the network's input (sizes do not count)."""
    stack = [node] if isinstance(node, fx.Node) else []
    while stack:
        current = stack[-1]
        if current in memo:
            stack.pop()
            continue
        parts = [] if str(current.target).startswith("aten.sym_size") else current.all_input_nodes
        open_parts = [p for p in parts if p not in memo]
        if open_parts:
            stack.extend(open_parts)
            continue
        memo[current] = current.op == "placeholder" or any(memo[p] for p in parts)
        stack.pop()
    return isinstance(node, fx.Node) and memo[node]


def make_plain(model: nn.Module, gm: fx.GraphModule) -> dict[str, str]:
    """Make layers of such operators in ``model`` and ``gm`` alike; by layer name, where its weight came from.

    The model must run ``gm`` (see `install`) from then on. A weight that depends on the input stays what it is.
    """
    made: dict[str, str] = {}
    memo: dict[fx.Node, bool] = {}
    with torch.no_grad():
        products = [p for n in list(gm.graph.nodes) if (p := _product(gm, n, memo)) is not None]
    first = {id(module): name for name, module in model.named_modules()}
    for product in products:  # of a shared module's paths the first
        product.path = first.get(id(_module(model, product.path)), product.path)
    taken: dict[str, _Product] = {}
    for product in products:
        name = _converted(model, gm, product, taken) or _added(model, gm, product)
        made[name] = _origin(product)
        _call(gm, product, name)
    rewrite.drop_unread(gm.graph)
    for product in products:
        _forget(model, gm, product)
    gm.graph.lint()
    gm.recompile()
    return made


def _product(gm: fx.GraphModule, node: fx.Node, memo: dict[fx.Node, bool]) -> _Product | None:
    if node.op != "call_function" or node.target not in PRODUCTS or node.kwargs or len(node.args) < 2:
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if depends_on_input(weight, memo) or depends_on_input(bias, memo) or not depends_on_input(node.args[0], memo):
        return None
    values: dict[fx.Node, Any] = {}
    found = _value(gm, weight, values)
    shift = None if bias is None else _value(gm, bias, values)
    if not isinstance(found, Tensor) or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        return None
    return _Product(node, tuple(node.args), str(node.meta.get("path", "")), found, shift)


def _value(gm: fx.GraphModule, node: Any, values: dict[fx.Node, Any]) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node not in values:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            values[node] = getattr(gm.get_submodule(owner), name)
        elif node.op == "call_module":
            values[node] = gm.get_submodule(str(node.target)).eval()(*(_value(gm, a, values) for a in node.args))
        elif node.op == "call_function" and str(node.target).startswith("aten.sym_size"):
            size = node.args[0].meta["val"].shape[node.args[1]]  # type: ignore[union-attr]
            values[node] = size if isinstance(size, int) else int(size.node.hint)
        else:
            for part in node.all_input_nodes:
                _value(gm, part, values)
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[misc]
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _origin(product: _Product) -> str:
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    return "weight_bits" if weight.op == "get_attr" else "weight materialised"


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _converted(model: nn.Module, gm: fx.GraphModule, product: _Product, taken: dict[str, _Product]) -> str | None:
    """The layer the operator was traced in, made a plain one of itself; None when it is no such layer."""
    path, module = product.path, _module(model, product.path)
    kind = standins.layer_kind(product.node.target)
    assert kind is not None
    if not path or module is None or not isinstance(module, kind):
        return None
    attributes = _attributes(product)
    if path in taken:
        return path if _equal(taken[path], product) else None
    if any(n.op == "call_module" and n.target == path for n in gm.graph.nodes):
        return None  # it is called as the layer it is, and once more with another weight
    taken[path] = product
    _strip(module)
    module.__class__ = kind
    module.__dict__.update(attributes)
    module._parameters.clear()
    module.weight = _parameter(product.weight)
    module.register_parameter("bias", None if product.bias is None else _parameter(product.bias))
    if module is not _module(gm, path):
        _place(gm, path, module)
    return path


def _equal(one: _Product, other: _Product) -> bool:
    """Whether two operators are one layer: the weight of a shared one is computed at every call."""
    same = _attributes(one) == _attributes(other) and torch.equal(one.weight, other.weight)
    biases = (one.bias, other.bias)
    return same and (biases == (None, None) or (None not in biases and torch.equal(*biases)))  # type: ignore[arg-type]


def _strip(module: nn.Module) -> None:
    """Take away what computed the weight: parametrizations, and the hooks of the older weight and spectral norm."""
    if parametrize.is_parametrized(module):
        # remove_parametrizations would take the weight's property from the class, which deep copies share.
        del module._modules["parametrizations"]
    for key, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            del module._forward_pre_hooks[key]
    for name in ("weight", "bias"):
        module.__dict__.pop(name, None)
        module._buffers.pop(name, None)
    for name in [n for n in module._buffers if n.startswith("weight_")]:
        if name != "weight_mask":
            del module._buffers[name]


def _added(model: nn.Module, gm: fx.GraphModule, product: _Product) -> str:
    """A new layer beside the children of the module the operator was traced in."""
    kind = standins.layer_kind(product.node.target)
    assert kind is not None
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.__dict__.update(_attributes(product))
    layer.register_parameter("weight", _parameter(product.weight))
    layer.register_parameter("bias", None if product.bias is None else _parameter(product.bias))
    path = product.path if product.path and _module(model, product.path) is not None else ""
    owner = _module(model, path)
    assert owner is not None
    layer.train(owner.training)
    base = _base_name(product)
    name, count = base, 1
    while hasattr(owner, name):
        name, count = f"{base}_{count}", count + 1
    full = f"{path}.{name}" if path else name
    owner.add_module(name, layer)
    _place(gm, full, layer)
    return full


def _base_name(product: _Product) -> str:
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    last = str(weight.target).rpartition(".")[2]
    if weight.op == "get_attr" and not str(weight.target).startswith(HOLDER) and last != "weight":
        return last.removesuffix("weight").rstrip("_") or last
    return str(product.node.target).split(".")[1]


def _attributes(product: _Product) -> dict[str, Any]:
    return standins.layer_attributes(product.node.target, list(product.args), product.weight, product.bias is not None)


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _place(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Put ``module`` under ``path`` of the graph module, whose containers may be shared with the model."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = gm.get_submodule(owner_path)
    except AttributeError:
        gm.add_submodule(path, module)
        return
    owner._modules[name] = module


def _call(gm: fx.GraphModule, product: _Product, name: str) -> None:
    with gm.graph.inserting_before(product.node):
        made = gm.graph.call_module(name, (product.node.args[0],))
    made.meta.update({**product.node.meta, "path": name})
    product.node.replace_all_uses_with(made)
    gm.graph.erase_node(product.node)


def _forget(model: nn.Module, gm: fx.GraphModule, product: _Product) -> None:
    """Drop a bare parameter that nothing but the new layer uses, so that it is no parameter twice."""
    for node in product.args[1:3]:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            continue
        target = str(node.target)
        owner_path, _, name = target.rpartition(".")
        owner = _module(model, owner_path)
        used = any(n.op == "get_attr" and str(n.target) == target for n in gm.graph.nodes)
        called = any(n.op == "call_module" and gm.get_submodule(str(n.target)) is owner for n in gm.graph.nodes)
        if owner is not None and not used and not called and name in owner._parameters:
            owner._parameters[name] = None
