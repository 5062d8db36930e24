"""Where quantizers go: decided on the graph, one per tensor, shared by everything that reads the tensor.

Demand-driven. A quantized layer, a residual add, a spatial average pool and an attention product ask for their
inputs on a grid; each demand is followed back through operators that only move values (reshape, max pool, dropout)
to the operator that made them, and there sits the tensor's one quantizer. So BatchNorm stays between its convolution
and its ReLU (it folds on export), a ReLU is never split from what it follows, and nothing is quantized twice.

A convolution has no integer kernel with a real result. So what reads one's result in floats (Hardswish, a gate, a
GroupNorm) asks for it on a grid too: between two grids a function of one tensor is a table, and a gate an integer
product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph.cost import MATMULS
from flatcompress.graph.plain import depends_on_input
from flatcompress.graph.pointwise import CLAMPS, function_of_one
from flatcompress.graph.rewrite import first_input
from flatcompress.modules import check_patterns, matches
from flatcompress.quant.operators import (
    FREE_LAYERS,
    GATES,
    MEANS,
    NONNEGATIVE,
    POOLS,
    RECURRENT,
    RELUS,
    TensorRow,
    passes,
)
from flatcompress.quant.quantizers.lsq import grid

aten = torch.ops.aten
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
LAYERS = (*CONVOLUTIONS, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Settings:
    """What `quantize` was asked for; see there."""

    weight_bits: int = 4
    activation_bits: int | None = 4
    first_last_bits: int = 8
    input_bits: int = 8
    residual_bits: int = 8
    input_signed: bool = True
    ignore: tuple[str, ...] = ()
    bits: dict[str, Any] = field(default_factory=dict)
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits", "input_bits", "residual_bits"):
            value = getattr(self, name)
            if value is not None or name != "activation_bits":
                _checked_bits(name, value)


@dataclass
class LayerRow:
    """A layer that gets quantized weights."""

    name: str
    bits: int
    why: str


def place(
    gm: fx.GraphModule, model: nn.Module, settings: Settings
) -> tuple[list[LayerRow], list[TensorRow], dict[str, str]]:
    """Decide for ``gm``, the traced graph of ``model``: which layers, which tensors, and what stays float and why.

    UserError for a layer name or pattern that matches nothing and for bits outside 2..8.
    """
    placement = _Placement(gm, model, settings)
    return placement.layers(), placement.tensors(), placement.floats


class _Placement:
    def __init__(self, gm: fx.GraphModule, model: nn.Module, settings: Settings) -> None:
        self.gm, self.model, self.settings = gm, model, settings
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.calls: dict[fx.Node, str] = {
            n: str(n.target) for n in self.nodes if n.op == "call_module" and isinstance(self._module(n), LAYERS)
        }
        self.floats: dict[str, str] = {}
        self._reach: dict[fx.Node, bool] = {}
        self._varies: dict[fx.Node, bool] = {}
        names = sorted(set(self.calls.values()))
        check_patterns("ignore", settings.ignore, self._paths(), listed=names)
        check_patterns("bits", settings.bits, names)
        self.quantized = {n: path for n, path in self.calls.items() if self._wanted(n, path)}
        self.first, self.last = self._ends()
        self._explain_floats()

    def _module(self, node: fx.Node) -> nn.Module:
        return self.gm.get_submodule(str(node.target))

    def _paths(self) -> list[str]:
        paths = {str(n.meta.get("path", "")) for n in self.nodes} | set(self.calls.values())
        return sorted(p for p in paths if p)

    # -- layers --------------------------------------------------------------------------------------------------

    def _wanted(self, node: fx.Node, path: str) -> bool:
        if any(matches(p, path) for p in self.settings.ignore):
            self.floats[path] = "named in ignore"
        elif not self._activation(node.args[0]):
            self.floats[path] = "its input does not depend on the network's input"
        return path not in self.floats

    def _activation(self, node: Any) -> bool:
        """Whether a tensor depends on the network's input."""
        return depends_on_input(node, self._varies)

    def _ends(self) -> tuple[set[str], set[str]]:
        """Paths of the first and of the last weighted layers: none before them, none after them."""
        return self._unreached(self.nodes, lambda n: n.all_input_nodes), self._unreached(
            reversed(self.nodes), lambda n: list(n.users)
        )

    def _unreached(self, order: Iterable[fx.Node], neighbours: Callable[[fx.Node], list[fx.Node]]) -> set[str]:
        behind: dict[fx.Node, bool] = {}
        ends = set()
        for node in order:
            met = any(behind.get(n, False) for n in neighbours(node) if n.target is not aten.sym_size.int)
            if node in self.calls and not met:
                ends.add(self.calls[node])
            behind[node] = met or node in self.calls
        return ends

    def layers(self) -> list[LayerRow]:
        rows: dict[str, LayerRow] = {}
        for path in self.quantized.values():
            given = self._override(path, "weight")
            if given is not None:
                rows[path] = LayerRow(path, given, "given in bits")
            elif path in self.first | self.last:
                which = "first" if path in self.first else "last"
                rows[path] = LayerRow(path, self.settings.first_last_bits, f"{which} layer")
            else:
                rows[path] = LayerRow(path, self.settings.weight_bits, "weight_bits")
        return list(rows.values())

    def _override(self, path: str, which: str) -> int | None:
        """The last matching entry of ``bits``: an integer is the weight's, {weight:, activation:} says both."""
        found = None
        for pattern, value in self.settings.bits.items():
            if matches(pattern, path):
                chosen = value.get(which) if isinstance(value, dict) else (value if which == "weight" else None)
                found = _checked_bits(f"bits[{pattern!r}]", chosen) if chosen is not None else found
        return found

    def _explain_floats(self) -> None:
        for node in self.nodes:
            path = str(node.meta.get("path", ""))
            if node.op == "call_function" and node.target in FREE_LAYERS:
                key = f"{path}:{node.name}"
                self.floats[key] = f"{node.target} on a weight that is no plain layer's own"
                if node.target is not aten.embedding.default and self._activation(node.args[1]):
                    self.floats[key] = "its weight is computed from the input"
            if node.op == "call_function" and node.target in RECURRENT:
                self.floats[path or node.name] = "a recurrent layer is kept float"
        called = set(self.calls.values())
        for path, module in self.model.named_modules():
            kind = type(module).__name__
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding):
                self.floats[path] = f"{kind} is kept float"
            elif isinstance(module, LAYERS) and path not in called:
                self.floats[path] = "not called as a layer in the traced forward"

    # -- tensors -------------------------------------------------------------------------------------------------

    def tensors(self) -> list[TensorRow]:
        """One row per tensor somebody wants on a grid, in graph order."""
        if self.settings.activation_bits is None:
            return []
        wants: dict[fx.Node, list[tuple[int, str]]] = {}
        readers: dict[fx.Node, set[fx.Node]] = {}
        for consumer in self.nodes:
            for argument, bits, why in self._demands(consumer):
                source, hop = self._source(argument, consumer)
                if source.op != "get_attr" and self._activation(source) and _is_real(source):
                    wants.setdefault(source, []).append((bits, why))
                    readers.setdefault(source, set()).add(hop)
        names = {*dir(nn.ModuleDict()), "data"}  # what the quantizers' holder has of its own
        return [self._row(n, wants[n], readers[n], names) for n in self.nodes if n in wants]

    def _demands(self, node: fx.Node) -> list[tuple[fx.Node, int, str]]:
        """(input, bits, why) for every input that ``node`` wants on a grid."""
        bits = self.settings.activation_bits
        assert bits is not None
        if node in self.quantized:
            path = self.quantized[node]
            given = self._override(path, "activation")
            if given is not None:
                bits = given
            elif path in self.last:
                bits = self.settings.first_last_bits
            return [(first_input(node), bits, f"input of {path}")]
        if self._residual(node):
            why = f"an input of {node.name}"
            parts = [p for p in node.all_input_nodes if self._activation(p)]
            unsigned = [self._nonnegative(self._source(p, node)[0]) for p in parts]
            return [(p, bits if u else self.settings.residual_bits, why) for p, u in zip(parts, unsigned)]
        if self._pool(node) and self._reaches(node):
            return [(first_input(node), bits, f"input of {node.name}")]
        if node.target in MATMULS and not any(matches(p, str(node.meta.get("path"))) for p in self.settings.ignore):
            parts = [p for p in node.args if isinstance(p, fx.Node)]
            if all(self._activation(p) for p in parts):
                return [(p, bits, f"factor of {node.name}") for p in parts]
        return self._keepers(node)

    def _keepers(self, node: fx.Node) -> list[tuple[fx.Node, int, str]]:
        """Demands of an operator on real values: for results of convolutions, and for both sides of a gate."""
        bits, wide = self.settings.activation_bits, self.settings.residual_bits
        assert bits is not None
        if node.op not in ("call_function", "call_module") or self._passes(node) or self._folds(node):
            return []
        if node.target in CLAMPS and self._result_of(node) is not None:
            return []  # it fuses into the convolution
        found = []
        gate = self._gate(node) and self._reaches(node)
        for part in dict.fromkeys(p for p in node.all_input_nodes if self._activation(p)):
            source = self._source(part, node)[0]
            layer = self._result_of(source)
            if gate or layer is not None:
                why = f"an input of {node.name}" if layer is None else f"keeps {layer} on integers"
                found.append((part, bits if self._nonnegative(source) else wide, why))
        return found

    def _result_of(self, node: fx.Node) -> str | None:
        """The quantized convolution whose result this is, after its BatchNorm and its clamps."""
        while node.target in CLAMPS or self._folds(node):
            node = first_input(node)
        path = self.quantized.get(node)
        return path if path is not None and isinstance(self._module(node), CONVOLUTIONS) else None

    def _folds(self, node: fx.Node) -> bool:
        """A BatchNorm by running statistics right behind the one layer it can be folded into."""
        if node.op != "call_module" or not isinstance(self._module(node), _NORMS):
            return False
        source = first_input(node)
        return source in self.calls and len(source.users) == 1 and self._module(node).running_mean is not None

    def _gate(self, node: fx.Node) -> bool:
        """A product of two activations of which one is bounded: squeeze-and-excite, spatial attention, GLU."""
        if node.target is not aten.mul.Tensor or self._function(node) is not None:
            return False
        parts = [p for p in node.args[:2] if isinstance(p, fx.Node) and self._activation(p)]
        return len(parts) == 2 and any(self._source(p, node)[0].target in GATES for p in parts)

    def _function(self, node: fx.Node) -> fx.Node | None:
        return function_of_one(node, self._activation)

    def _row(self, node: fx.Node, wants: list[tuple[int, str]], hops: set[fx.Node], names: set[str]) -> TensorRow:
        name = _unique(self._name(node), names)
        why = "; ".join(dict.fromkeys(w for _, w in wants))
        if node.op == "placeholder":
            bits, signed = self.settings.input_bits, self.settings.input_signed
        else:
            bits = max(b for b, _ in wants)
            wide = self.settings.symmetric and bits == 8  # 7 bits without a sign fit int8 as they are
            signed = wide or not self._nonnegative(node)
        return TensorRow(name, bits, signed, why, node, self._readers(node, hops))

    def _readers(self, node: fx.Node, hops: set[fx.Node]) -> list[fx.Node]:
        """Who reads the quantized tensor: everyone on the integer path; beside a float island only who asked."""
        users = [u for u in node.users if u.op != "output" and u.target is not aten.sym_size.int]
        if self._island(node):
            return [u for u in users if u in hops]
        return users

    def _island(self, node: fx.Node) -> bool:
        """Made by a float operator (LayerNorm, GELU, a float add), which others may go on reading in float."""
        if node.op == "placeholder" or self._pool(node) or node.target in RELUS | {aten.hardtanh.default}:
            return False
        if node.op == "call_module":
            return not isinstance(self._module(node), (*LAYERS, *_NORMS))
        if self._gate(node) or self._function(node) is not None:
            return not self._reaches(node)
        return not self._residual(node)

    def _source(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What made the values of ``node``, and the first operator after it on the way to ``reader``."""
        while self._passes(node):
            node, reader = first_input(node), node
        return node, reader

    def _passes(self, node: fx.Node) -> bool:
        return passes(self.gm, node)

    def _pool(self, node: fx.Node) -> bool:
        if node.target in POOLS:
            return True
        return node.target in MEANS and first_input(node).meta["val"].dim() == 4

    def _residual(self, node: fx.Node) -> bool:
        """An add or concatenation of activations on the integer path: what it makes ends in a quantized layer."""
        if node.target is aten.add.Tensor:
            parts: list[Any] = list(node.args[:2])
        elif node.target is aten.cat.default:
            parts = list(node.args[0])  # type: ignore[arg-type]
        else:
            return False
        return all(isinstance(p, fx.Node) and self._activation(p) for p in parts) and self._reaches(node)

    def _reaches(self, node: fx.Node) -> bool:
        """Whether a quantized layer reads this tensor, with nothing but integer-friendly operators in between."""
        if node not in self._reach:
            self._reach[node] = False
            self._reach[node] = any(u in self.quantized or (self._friendly(u) and self._reaches(u)) for u in node.users)
        return self._reach[node]

    def _friendly(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._passes(node) or isinstance(self._module(node), _NORMS)
        friends = RELUS | {aten.hardtanh.default, aten.add.Tensor, aten.cat.default}
        if self._passes(node) or self._pool(node) or node.target in friends:
            return True
        return self._gate(node) or self._function(node) is not None

    def _nonnegative(self, node: fx.Node) -> bool:
        if node.target is aten.hardtanh.default:
            return len(node.args) > 1 and float(node.args[1]) >= 0  # type: ignore[arg-type]
        if node.target in NONNEGATIVE:
            return True
        if self._passes(node) or self._pool(node):
            return self._nonnegative(first_input(node))
        if node.target in (aten.add.Tensor, aten.cat.default):
            parts = node.all_input_nodes
            return len(parts) > 0 and all(self._activation(p) and self._nonnegative(p) for p in parts)
        return False

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "input"
        path = str(node.meta.get("path", ""))
        in_container = not path or any(p.startswith(f"{path}.") for p in self._paths())
        if node.op == "call_function" and in_container:
            kind = str(node.target).split(".")[1] if "." in str(node.target) else "op"
            path = f"{path}.{kind}" if path else kind
        return re.sub(r"\W", "_", path)


def _is_real(node: fx.Node) -> bool:
    """Whether a node makes real numbers: no token ids, no truth values."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _unique(name: str, names: set[str]) -> str:
    found, count = name, 1
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found


def _checked_bits(key: str, value: Any) -> int:
    try:
        grid(value, signed=True)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return value


def readers_of_quantizers(model: nn.Module, graph: fx.Graph, names: set[str]) -> dict[str, str]:
    """For each activation quantizer the first quantized layer that reads it, or itself when there is none."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("quantizers."):
            found[str(node.target)] = _first_layer(model, node, names) or str(node.target)
    return found


def _first_layer(model: nn.Module, node: fx.Node, names: set[str]) -> str | None:
    frontier = list(node.users)
    while frontier:
        user = frontier.pop(0)
        if user.op == "call_module" and str(user.target) in names:
            return None if str(user.target).startswith("quantizers.") else str(user.target)
        if passes(model, user):
            frontier.extend(user.users)
    return None
