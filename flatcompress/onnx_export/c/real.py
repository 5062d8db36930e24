"""What lies between codes and codes on real values, as rows that the C brings in, changes and puts away.

Softmaxes, norms and functions of one value are computed in float32 by routines of our own (``kernels/rows.h``): every
board gives the same bits, and onnxruntime, whose order of additions is not fixed, others by a rounding. A function of
one tensor of codes is no arithmetic at all: it is a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flatcompress.onnx_export.c import ir
from flatcompress.onnx_export.c.layout import Placed, affine, in_order, whole
from flatcompress.onnx_export.c.refusing import name_of, path_of, refuse
from flatcompress.onnx_export.lower import integer

aten = torch.ops.aten
# Functions of one value; those without a name have no C of their own and are tables, or refused.
FUNCTIONS: dict[Any, str | None] = {
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    **{
        getattr(aten, name).default: None
        for name in ("hardtanh", "leaky_relu", "elu", "selu", "softplus", "mish", "exp")
    },
    **{getattr(aten, name).default: None for name in ("relu6", "log_sigmoid", "celu", "abs", "neg", "clamp", "sqrt")},
}
SUMS = {aten.add.Tensor: "add", operator.add: "add"}
FACTORS = {aten.mul.Tensor: "times", operator.mul: "times"}
QUOTIENTS = {aten.div.Tensor: "divide", operator.truediv: "divide"}
SOFTMAXES = (aten.softmax.int, aten._softmax.default)


@dataclass(eq=False)
class Decoded:
    """Codes that are read as real values; every reader takes them from the codes."""

    codes: Placed


@dataclass(eq=False)
class Chain:
    """Rows that are not put away yet. index: of the elements, as in `layout.Placed`; dims: (height, width, channels)
    of the tensor that they would make; functions: the changes in torch, as long as the result is one of codes."""

    step: ir.Rows
    index: Tensor
    dims: tuple[int, int, int]
    functions: list[Callable[[Tensor], Tensor]] | None = field(default_factory=list)

    def change(self, name: str, operand: Any = None, function: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add a change; one without a ``function`` is more than a function of one value."""
        self.step.changes.append((name, operand))
        if self.functions is not None:
            self.functions = None if function is None else [*self.functions, function]

    @property
    def by_rows(self) -> bool:
        """Whether the last dimension of the value is a row."""
        count, columns = self.index.numel(), self.step.columns
        same = self.index.shape[-1] == columns and count == self.step.rows * columns
        return same and torch.equal(self.index.reshape(-1, columns) % columns, _columns(count, columns))


def _columns(count: int, columns: int) -> Tensor:
    return torch.arange(columns).expand(count // columns, columns)


def spread(constant: Tensor, index: Tensor, columns: int) -> NDArray[np.float32] | None:
    """A constant in the order of the rows: one row where all are equal. None where it does not fit the value."""
    try:
        full = constant.detach().float().expand(index.shape)
    except RuntimeError:
        return None
    flat = torch.zeros(index.numel())
    flat[index.flatten()] = full.flatten()
    rows = flat.reshape(-1, columns)
    return (rows[0] if bool((rows == rows[0]).all()) else rows.flatten()).numpy().astype(np.float32)


def table(chain: Chain, source: ir.Codes, grid: integer.Grid) -> NDArray[np.uint8]:
    """A function of codes of ``source`` as bytes on ``grid``, in torch's arithmetic."""
    assert chain.functions is not None
    codes = torch.arange(source.high + 1, dtype=torch.float32) + source.base
    values = integer.Dequantize(source.grid)(codes)
    for function in chain.functions:
        values = function(values)
    out = integer.Quantize(grid)(values).numpy() - min(grid.low, grid.zero_point)
    return out.astype(np.uint8)


def applied(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """A node's function of its first argument."""
    target: Any = node.target
    return lambda value: target(value, *node.args[1:], **node.kwargs)


def function_name(node: fx.Node) -> str | None:
    """The C routine of a function of one value, or None."""
    name = FUNCTIONS[node.target]
    return "gelu_tanh" if name == "gelu" and node.kwargs.get("approximate") == "tanh" else name


class Reals:
    """The part of the reader that makes chains of rows and puts them away."""

    env: dict[fx.Node, Any]
    program: ir.Program
    gm: fx.GraphModule

    def _placed(self, node: Any, user: fx.Node) -> Placed:
        """A value that lies somewhere; rows that were not put away are put into the arena."""
        held = self.env.get(node)
        if isinstance(held, Decoded):
            held = self._decoded(held, node)
        if isinstance(held, Chain):
            held = self.env[node] = self._put_away(held, node)
        if not isinstance(held, Placed):
            raise refuse(
                path_of(user) or path_of(node), f"{name_of(user)} on what {path_of(node) or node.name!r} gives"
            )
        return held

    def _put_away(self, chain: Chain, node: fx.Node) -> Placed:
        real = ir.Real(node.name, *chain.dims)
        self._finish(chain, real)
        return Placed(real, chain.index)

    def _finish(self, chain: Chain, out: ir.Tensor | None, rounded: bool = False) -> None:
        for name, operand in chain.step.changes:
            if name == "function":
                raise refuse(chain.step.path, f"{operand} of real values")
        chain.step.out, chain.step.rounded = out, rounded
        self.program.steps.append(chain.step)

    def _chain(self, node: Any, user: fx.Node) -> Chain:
        """Rows to go on with: those of ``node`` where nobody else needs them, or new ones that read them."""
        held = self.env.get(node)
        if isinstance(held, Decoded):
            return self._decoded(held, user)
        if isinstance(held, Chain) and not held.step.mean:
            return held
        placed = self._placed(node, user)
        if isinstance(placed.tensor, ir.Codes):
            raise refuse(path_of(user), f"{name_of(user)} on codes")
        found = affine(placed.index.reshape(-1, placed.index.shape[-1]))
        if found is None or (placed.index.shape[-1] > 1 and found[1][1] != 1):
            raise refuse(path_of(user), f"{name_of(user)} of real values in another order")
        rows, columns = placed.index.numel() // placed.index.shape[-1], int(placed.index.shape[-1])
        first, (stride, _) = found
        step = ir.Rows(path_of(user), [placed.tensor], None, rows, columns, None, first, stride)
        return Chain(step, in_order(placed.index.shape[1:]), (1, rows, columns), None)

    def _hold(self, node: fx.Node, chain: Chain) -> None:
        """Rows that more than one needs are put into the arena at once."""
        chain.step.path = path_of(node) or chain.step.path
        self.env[node] = chain
        users = [user for user in node.users if user.target is not aten.sym_size.int]
        if len(users) > 1:
            self._placed(node, node)

    def _begin(self, node: fx.Node, module: integer.Dequantize) -> None:
        placed = self._placed(node.args[0], node)
        if not whole(placed):
            placed = self._in_order(placed, node)
        self.env[node] = Decoded(placed)

    def _decoded(self, held: Decoded, user: fx.Node) -> Chain:
        tensor = held.codes.tensor
        step = ir.Rows(path_of(user), [tensor], None, tensor.height * tensor.width, tensor.channels)
        step.stride = tensor.channels
        return Chain(step, held.codes.index, (tensor.height, tensor.width, tensor.channels))

    def _in_order(self, placed: Placed, user: fx.Node) -> Placed:
        raise NotImplementedError

    # --- changes ----------------------------------------------------------------------------------------------

    def _layer_norm(self, node: fx.Node, module: Any) -> None:
        chain = self._chain(node.args[0], node)
        size, columns = tuple(module.normalized_shape), chain.step.columns
        if size != (columns,) or not chain.by_rows:
            raise refuse(path_of(node), "a layer norm over more or other than the last dimension")
        weight, bias = (
            np.full(columns, fill, np.float32) if value is None else value.detach().cpu().numpy().astype(np.float32)
            for value, fill in ((module.weight, 1.0), (module.bias, 0.0))
        )
        chain.change("norm", (weight, bias, float(module.eps)))
        self._hold(node, chain)

    def _real_function(self, node: fx.Node) -> bool:
        """Do a function on real values; False where it is none that has a C form."""
        target = node.target
        if target in FUNCTIONS:
            chain, name = self._chain(node.args[0], node), function_name(node)
            chain.change(name or "function", None if name else name_of(node), applied(node))
        elif target in SOFTMAXES:
            chain = self._chain(node.args[0], node)
            if int(node.args[1]) % chain.index.dim() != chain.index.dim() - 1 or not chain.by_rows:  # type: ignore[arg-type]
                raise refuse(path_of(node), "a softmax over another than the last dimension")
            chain.change("softmax")
        elif target in SUMS or target in FACTORS or target in QUOTIENTS:
            chain = self._arithmetic(node)
        elif target is aten.mean.dim:
            self._mean(node)
            return True
        else:
            return False
        self._hold(node, chain)
        return True

    def _arithmetic(self, node: fx.Node) -> Chain:
        name = {**SUMS, **FACTORS, **QUOTIENTS}[node.target]
        first, second = node.args[:2]
        if node.kwargs:
            raise refuse(path_of(node), f"{name_of(node)} with {', '.join(node.kwargs)}")
        a, b = self._held(first), self._held(second)
        other_way = not isinstance(a, Chain | Placed | Decoded) or (isinstance(a, Placed) and isinstance(b, Chain))
        if name != "divide" and other_way:
            first, second, b = second, first, a
        if not isinstance(b, Chain | Placed | Decoded):
            return self._with_constant(node, name, first, second if b is None else b)
        chain, other = self._chain(first, node), self._placed(second, node)
        same = torch.equal(chain.index.expand(other.index.shape), other.index) and whole(other)
        if name != "add" or not same or not isinstance(other.tensor, ir.Real):
            raise refuse(path_of(node), f"{name_of(node)} of two tensors of real values")
        chain.step.sources.append(other.tensor)
        chain.change("add", other.tensor)
        return chain

    def _held(self, value: Any) -> Any:
        return self.env.get(value) if isinstance(value, fx.Node) else None

    def _with_constant(self, node: fx.Node, name: str, first: Any, constant: Any) -> Chain:
        chain = self._chain(first, node)
        if isinstance(constant, int | float):
            known = {"times": "scale", "divide": "divide"}.get(name)
            if known is None:
                raise refuse(path_of(node), f"{name_of(node)} of a number")
            chain.change(known, float(np.float32(constant)), applied(node))
            return chain
        values = spread(constant, chain.index, chain.step.columns) if isinstance(constant, Tensor) else None
        if values is None or name == "divide":
            raise refuse(path_of(node), f"{name_of(node)} with a tensor of another shape")
        chain.change("constant" if name == "add" else "factors", values)
        return chain

    def _mean(self, node: fx.Node) -> None:
        chain = self._chain(node.args[0], node)
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [given] if isinstance(given, int) else list(given or ())
        shape = chain.index.shape
        if len(shape) != 3 or [int(d) % 3 for d in dims] != [1] or not chain.by_rows:
            raise refuse(path_of(node), "a mean of real values over anything but the tokens of [B, T, C]")
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        chain.step.mean, chain.functions, chain.dims = True, None, (1, 1, chain.step.columns)
        chain.index = in_order((1, shape[2]) if keep else (shape[2],))
        self._hold(node, chain)

    # --- ends -------------------------------------------------------------------------------------------------

    def _quantized(self, node: fx.Node, grid: integer.Grid, rounded: bool = False) -> None:
        """Codes of rows; of a function of one tensor of codes, a table."""
        held = self.env.get(node.args[0]) if not rounded else self.env[node]  # type: ignore[arg-type]
        chain = held if isinstance(held, Chain) else self._chain(node.args[0], node)
        out, source = ir.Codes(node.name, *chain.dims, grid), chain.step.sources[0]
        if chain.functions is not None and chain.step.begin is None and isinstance(source, ir.Codes):
            values = table(chain, source, grid)
            self.program.steps.append(ir.Table(chain.step.path or path_of(node), [source], out, values))
        else:
            chain.step.path = chain.step.path or path_of(node)
            self._finish(chain, out, rounded)
        self.env[node] = Placed(out, chain.index)

    def _matmul(self, node: fx.Node, module: integer.IntegerMatMul) -> None:
        """[.., M, K] times [.., K, N]: rows of N, those of one m beside each other, as attention wants its heads."""
        operands = [self._placed(arg, node) for arg in node.args]
        if any(placed.index.dim() not in (3, 4) or not isinstance(placed.tensor, ir.Codes) for placed in operands):
            raise refuse(path_of(node), "a product of other than [B, M, K] or [B, heads, M, K]")
        heads = max(placed.index.shape[1] if placed.index.dim() == 4 else 1 for placed in operands)
        views = []
        for placed in operands:
            if affine(placed.index) is None:
                placed = self._in_order(placed, node)
            index = placed.index if placed.index.dim() == 4 else placed.index[:, None]
            found = affine(index[0].expand(heads, -1, -1))
            assert found is not None
            views.append((placed.tensor, found, index.shape[-2:]))
        (a, (at, (head, row, step)), (rows, depth)), (b, (to, (other, deep, column)), (_, columns)) = views
        factor = integer.scale32(module.first.scale) * integer.scale32(module.second.scale)
        if module.out_grid is not None:
            factor = factor / integer.scale32(module.out_grid.scale)
        product = ir.Product(
            heads, rows, columns, depth, (at, head, row, step), (to, other, column, deep), np.float32(factor)
        )
        made = ir.Rows(path_of(node), [a, b], None, rows * heads, columns, product)
        index = torch.arange(rows * heads * columns).reshape(1, rows, heads, columns).transpose(1, 2)
        if operands[0].index.dim() == 3 and operands[1].index.dim() == 3:
            index = index[:, 0]
        chain = Chain(made, index, (1, rows, heads * columns), None)
        self.env[node] = chain
        if module.out_grid is None:
            self._hold(node, chain)
        else:
            self._quantized(node, module.out_grid, rounded=True)
