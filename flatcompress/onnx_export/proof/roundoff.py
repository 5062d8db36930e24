"""How far roundoff alone may move a reference's outputs: what a certificate holds a changed argmax against.

Two correct evaluations of one file differ where they add floats in another order, and a code that lies on a rounding
boundary then goes up in one and down in the other. Here the reference is run again and again with every float result
moved by the error that its operation may have, each value up or down by chance, so whatever lies that near a boundary
goes either way. The largest change of an output is the bound. It comes from the reference and the inputs alone: a
wrong file cannot widen what it is judged by.

The error of a float result is taken as ``(8 + sqrt(n)) u max|y|``: u is the unit roundoff, n the number of terms that
are added, max|y| the sample's largest value (the probabilistic bound of Higham and Mary, SISC 2019, thm. 2.4, with the
largest result in place of the sum of magnitudes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from flatcompress.modules import weight_of
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.proof import integers, parity
from flatcompress.onnx_export.proof.evidence import BYTES
from flatcompress.onnx_export.proof.parity import reference_outputs
from flatcompress.onnx_export.proof.samples import Inputs, Samples

SINGLE = 2.0**-24
HALF = 2.0**-11
EVALUATIONS = 256  # of one sample each; few samples are repeated more often
FEWEST, MACS = 48, 5e9  # a large network is evaluated less often: the largest of 48 changes is near that of 256
KEPT = 256 << 20  # bytes of what nothing moves that are kept
_SAFETY = 8.0
_PLACES = 1 << 16


def roundoff(
    reference: fx.GraphModule,
    inputs: Sequence[Any] | Samples,
    *,
    floats: bool,
    unit: float = SINGLE,
    seed: int = 0,
    output: int = 0,
    evaluations: int = EVALUATIONS,
    known: NDArray[np.float32] | None = None,
) -> float:
    """The largest change of an output of ``reference``, in the outputs' own unit, that roundoff makes on ``inputs``.

    inputs: batches [B, ...]; of many samples, ``evaluations`` / 2 spread over them are taken, of a large
    network fewer. output: which one, of several. floats: the runtime
    convolves dequantized floats (onnxruntime without optimizations, profile qonnx), so that integer layers round too;
    otherwise their sums are exact and only real-valued operators count. unit: unit roundoff of the runtime's floats.
    known: the reference's outputs on all samples, where they were computed before.
    """
    cost = max(1, sum(work.macs for work in integers.works(reference)))
    evaluations = min(evaluations, max(FEWEST, round(MACS / cost)))
    given = inputs if isinstance(inputs, Samples) else Samples(reference, inputs)
    count = min(len(given), evaluations // 2)
    indices = torch.linspace(0, len(given) - 1, count).round().long()
    few = given.chosen(indices)
    bytes_each = sum(value.nbytes for value in few) // count
    together = max(1, min(64, BYTES // max(1, bytes_each)))  # few large images at a time
    parts = [given.chosen(part, few) for part in torch.arange(count).split(together)]
    if known is not None and parity.is_exact(reference):  # else a sample's output may depend on its batch
        expected = known[indices.numpy()]
    else:
        expected = reference_outputs(reference, parts, output)
    turns = torch.arange(max(evaluations, 2 * count)) % count
    moved, largest = _Moved(reference, floats, unit, seed), 0.0
    fixed = _Fixed(moved, given, few, parts)
    for index in turns.split(together):
        result = moved.from_(fixed.at(index), parity.laid(reference, given.chosen(index, few)))
        found = (result[output] if isinstance(result, tuple | list) else result).cpu().numpy()
        difference = np.abs(found.astype(np.float64) - expected[index.numpy()])
        largest = max(largest, float(np.nanmax(difference, initial=0.0)))
    return largest if math.isfinite(largest) else 0.0


def real_operators(reference: fx.GraphModule) -> list[str]:
    """The modules of a quantized reference that compute on floats and are quantized again after it.

    Their results round differently from processor to processor and from one release of a runtime to the next; a code on
    a boundary then moves. Integer layers, and floats that only go on to the output, are not among them.
    """
    before: set[fx.Node] = set()
    for node in reference.graph.nodes:
        module = reference.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, integer.Quantize):
            before.update(_floats_before(reference, node))
    paths = [str(node.meta.get("path") or node.name) for node in reference.graph.nodes if node in before]
    return list(dict.fromkeys(paths))


def _floats_before(reference: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    """Every node on the way to ``node`` that computes on floats, back to where they come from codes."""
    found: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        module = reference.get_submodule(str(source.target)) if source.op == "call_module" else None
        exact = isinstance(module, integer.Dequantize | integer.Rounded | integer.Quantize | integer.ClampCodes)
        if source in found or exact or source.op not in ("call_module", "call_function"):
            continue
        found.add(source)
        waiting += source.all_input_nodes
    return found


class _Moved(fx.Interpreter):
    """Runs a reference with every float result moved by its error, up or down by chance.

    ``touched``: nodes whose results were moved, or come from such.
    """

    def __init__(self, reference: fx.GraphModule, floats: bool, unit: float, seed: int) -> None:
        super().__init__(reference)
        self.floats, self.unit = floats, unit
        self.generator = torch.Generator().manual_seed(seed)
        self.signs = torch.empty(0)  # drawn once, for drawing takes longer than all that is computed with it
        self.codes: set[fx.Node] = set()
        self.touched: set[fx.Node] = set()
        self.moving = True

    @torch.no_grad()
    def from_(self, values: Mapping[fx.Node, Any], inputs: Sequence[Tensor], moving: bool = True) -> Any:
        """The result for ``inputs``, with the ``values`` of some nodes given; moved unless told otherwise."""
        self.moving = moving
        return self.run(*inputs, initial_env=dict(values))

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        if any(source in self.touched for source in n.all_input_nodes):
            self.touched.add(n)
        if n.op == "call_module":
            return self._module(n, self.fetch_attr(str(n.target)))
        result = super().run_node(n)
        if any(source in self.codes for source in n.all_input_nodes):  # it moves codes and computes nothing
            self.codes.add(n)
            return result
        return self._move(n, result, _terms(n, self.env))

    def _module(self, n: fx.Node, module: nn.Module) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        if isinstance(module, integer.Rounded):
            value = module.value(*args)
            if module.out_grid is None:
                return self._move(n, value, module.terms(*args) if self.floats else 1)
            self.codes.add(n)
            return module.codes(self._move(n, value, module.terms(*args)) if self.floats else value)
        result = module(*args)
        if isinstance(module, integer.Quantize | integer.ClampCodes | integer.Table):
            self.codes.add(n)
            return result
        if isinstance(module, integer.Dequantize):  # one product, rounded alike everywhere
            return result
        weight = weight_of(module)
        return self._move(n, result, weight[0].numel() if weight is not None and weight.dim() > 1 else 1)

    def _move(self, n: fx.Node, result: Any, terms: int) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.dim() == 0:
            return result
        self.touched.add(n)
        if not self.moving:
            return result
        error = (_SAFETY + math.sqrt(terms)) * self.unit * _largest(result)
        return torch.addcmul(result, self._signs(result), error.to(result.dtype))

    def _signs(self, result: Tensor) -> Tensor:
        """1 or -1 by chance for every value: of what was drawn a part that begins at a place drawn anew."""
        size = result.numel()
        if len(self.signs) < size + _PLACES:
            drawn = torch.empty(size + _PLACES).random_(0, 2, generator=self.generator)
            self.signs = drawn.mul_(2).sub_(1)
        first = int(torch.randint(_PLACES, (), generator=self.generator))
        part = self.signs[first : first + size].to(result.dtype)
        dense = result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last)
        return part.as_strided(result.shape, result.stride()) if dense else part.view(result.shape)


class _Kept(fx.Interpreter):
    """Runs what of a reference nothing moves, and keeps the results that are wanted."""

    def __init__(self, moved: _Moved, wanted: Sequence[fx.Node]) -> None:
        super().__init__(moved.module)
        self.wanted, self.skipped = set(wanted), dict.fromkeys(moved.touched)
        self.found: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The wanted results for ``inputs``."""
        self.found = {}
        self.run(*inputs, initial_env=dict(self.skipped))
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result


class _Fixed:
    """What nothing moves, computed once for every sample, for each is gone on from several times.

    Nothing is kept where it is no tensor of samples, or more than `KEPT`.
    """

    def __init__(self, moved: _Moved, given: Samples, few: Inputs, parts: Sequence[Inputs]) -> None:
        reference: Any = moved.module
        probe = given.chosen(torch.arange(min(2, given.count(few))), few)
        moved.from_({}, parity.laid(reference, probe), moving=False)  # which nodes are touched is seen on two samples
        calls = [n for n in reference.graph.nodes if n.op in ("call_module", "call_function")]
        self.steady = [n for n in calls if n not in moved.touched]
        wanted = [n for n in self.steady if any(user in moved.touched or user.op == "output" for user in n.users)]
        kept, self.values = _Kept(moved, wanted), dict[fx.Node, Tensor]()
        found, size = kept.of(parity.laid(reference, probe)), given.count(probe)
        fits = all(isinstance(v, Tensor) and v.shape[:1] == (size,) for v in found.values())
        if found and fits and sum(v.nbytes for v in found.values()) // size * given.count(few) <= KEPT:
            columns = [kept.of(parity.laid(reference, part)) for part in parts]
            self.values = {n: torch.cat([column[n] for column in columns]) for n in wanted}

    def at(self, index: Tensor) -> dict[fx.Node, Any]:
        """The nodes not to be computed again, with their values of the samples [index] where those are read."""
        if not self.values:
            return {}
        return {n: self.values[n][index] if n in self.values else None for n in self.steady}


def _largest(result: Tensor) -> Tensor:
    """max|y| of the finite values of each sample, [B, 1, ...]; of one dimension each value's own."""
    if result.dim() == 1:
        return torch.where(result.isfinite(), result, torch.zeros_like(result)).abs()
    rest = tuple(range(1, result.dim()))
    found = torch.maximum(result.amax(rest, keepdim=True), -result.amin(rest, keepdim=True))
    if bool(found.isfinite().all()):
        return found
    return torch.where(result.isfinite(), result, torch.zeros_like(result)).abs().amax(rest, keepdim=True)


def _terms(node: fx.Node, env: dict[fx.Node, Any]) -> int:
    """How many numbers a function may add for one of its results: the last axis of its widest input."""
    sizes = [
        env[source].shape[-1]
        for source in node.all_input_nodes
        if isinstance(env.get(source), Tensor) and env[source].dim()
    ]
    return max([1, *sizes])
