"""What a model costs in milliseconds at any widths here: measured in onnxruntime, in the form that is exported.

Every layer is timed as the int8 kernel it becomes, at the widths that matter. Kernels come in steps, and narrower is
not always faster: with AVX-512, a convolution pays for whole blocks of 16 outputs, takes up to 5 times as long where
its inputs are no multiple of 4, and a depthwise one twice as long at 24 channels as at 32. So widths are measured, and
one between two measured outputs counts as the dearer of them. The sum over the layers is not the network: residual
adds, pooling, requantization and the runtime itself are missing, the profiler's own cost is in it, and what the
caches do is another matter. So the network is also exported dense and at a few cuts, each timed as a whole, and
the sum is read off the curve through these points. Figures are kept on disk, per machine, threads and version.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcompress import onnx_export, prune, quant
from flatcompress.environment import machine
from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.onnx_export.runtime import latency
from flatcompress.onnx_export.runtime.kernel_time import kernel_ms
from flatcompress.prune.budgets.cost import Cost
from flatcompress.storage import cache_folder, write_json_atomic

METHOD = 2  # of measuring: figures of another one are not used
EVENLY = (0.75, 0.5, 0.2)  # networks timed as a whole, beside the dense one: shares of every layer's channels,
WEIGHED = (0.7, 0.5, 0.35)  # and of the kernels' sum
RUNS = 21
BELOW = 4  # activation bits that those below 8 are timed at
Shape = dict[str, Any]
Figures = dict[str, dict[str, Any]]  # layers: {shape: {widths: ms}}, networks: {model: [[sum of kernels, ms]]}


class LatencyTable:
    """Milliseconds of ``model`` at any widths: a cost function for `prune.Budget` (kind cost).

    ``example``: input [B, C, H, W]. ``cache``: the JSON file that figures are kept in (None: in the user's cache
    folder). ``threads``: of onnxruntime; with one, CPU time is taken, which other users of the machine do not
    lengthen. ``activation_bits``: the kernels are int8 all the same, but below 8 the file clips in between, which took
    ResNet-8 at 24 px 12 % longer, at 2 bits as at 7. UserError for layers other than 2-d convolutions and linear.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, cache: Path | None = None, threads: int = 1, activation_bits: int = 8
    ) -> None:
        self.path, self.threads = cache or cache_file(threads), threads
        self.activation_bits = 8 if activation_bits == 8 else BELOW
        self.shapes = layer_shapes(model, example)
        self.dense = prune.CostModel(model, example).dense
        self._measure_layers()
        self._costs = {name: self._layer(shape) for name, shape in self.shapes.items()}
        self.curve = Curve(self._points(model, example))

    def __call__(self, widths: Mapping[str, prune.Width]) -> float:
        """Estimated milliseconds at ``widths`` ({name: Width(inputs, outputs, groups)})."""
        return self.curve(self.kernels(widths))

    def kernels(self, widths: Mapping[str, prune.Width]) -> float:
        """Summed milliseconds of the layers' kernels at ``widths``."""
        return sum(cost(widths[name]) for name, cost in self._costs.items())

    def _measure_layers(self) -> None:
        kept = _load(self.path)["layers"]
        for shape in self.shapes.values():
            own = kept.setdefault(_key(shape), {})
            missing = [(i, o) for i, o in pairs(shape) if f"{i}x{o}" not in own]
            if missing:
                own |= {f"{i}x{o}": ms for (i, o), ms in kernel_ms(shape, missing, self.threads).items()}
        self._kept = keep(self.path, {"layers": kept, "networks": {}})

    def _layer(self, shape: Shape) -> LayerCost:
        inputs, outputs = grid(shape)
        figures = iter([self._kept["layers"][_key(shape)][f"{i}x{o}"] for i, o in pairs(shape)])
        return LayerCost(inputs, outputs, [[next(figures) for _ in outputs] for _ in inputs])

    def _points(self, model: nn.Module, example: Tensor) -> list[list[float]]:
        text = f"{model!r}{json.dumps(self.shapes)}{tuple(example.shape[1:])}"
        text += "" if self.activation_bits == 8 else f"A{self.activation_bits}"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._kept["networks"]:
            cuts = some_cuts(model, example, self.kernels)
            found = networks_ms(cuts, example, self.threads, self.activation_bits)
            points = [[self.kernels(widths), ms] for widths, ms in found]
            self._kept = keep(self.path, {"layers": {}, "networks": {key: points}})
        return self._kept["networks"][key]


@dataclass(frozen=True)
class LayerCost:
    """Milliseconds [inputs][outputs] of one layer on a grid of widths; inputs has one row for a depthwise layer."""

    inputs: Sequence[int]
    outputs: Sequence[int]
    table: Sequence[Sequence[float]]

    def __call__(self, width: prune.Width) -> float:
        """Linear between inputs; between outputs the dearer neighbour, for kernels work on whole blocks of those."""
        at = min(bisect_left(self.outputs, width.outputs), len(self.outputs) - 1)
        exact = at == 0 or self.outputs[at] <= width.outputs
        column = [row[at] if exact else max(row[at - 1], row[at]) for row in self.table]
        return between(self.inputs, column, width.inputs) if len(column) > 1 else column[0]


def between(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """Linear between ``at`` (ascending), constant outside."""
    high = bisect_left(at, x)
    if high == 0 or high == len(at):
        return values[min(high, len(at) - 1)]
    share = (x - at[high - 1]) / (at[high] - at[high - 1])
    return values[high - 1] + share * (values[high] - values[high - 1])


@dataclass(frozen=True)
class Curve:
    """Milliseconds of a network as a function of the sum of its kernels, from the networks that were timed.

    The parabola (a line for fewer than five points) that is nearest to the points (x, y) by relative error, the first,
    of the dense network, counting twice: budgets are shares of it. It rises everywhere; beyond the points it goes
    straight on, and downwards never faster than to zero.
    """

    points: Sequence[Sequence[float]]

    def __call__(self, x: float) -> float:
        """Milliseconds at a sum of ``x``."""
        least, most = self._ends
        inside = min(max(x, least), most)
        a, b, c = self._fit
        y = a + b * inside + c * inside**2
        straight = y + (b + 2 * c * inside) * (x - inside)
        return max(straight, y * x / least) if x < least else straight

    @property
    def _ends(self) -> tuple[float, float]:
        at = [point[0] for point in self.points]
        return min(at), max(at)

    @cached_property
    def _fit(self) -> tuple[float, float, float]:
        x, y = np.array([self.points[0], *self.points], dtype=float).T
        least, most = self._ends
        for degree in (2, 1) if len(self.points) > 4 else (1,):
            powers = np.stack([x**d / y for d in range(degree + 1)], axis=1)
            a, b, c = [*np.linalg.lstsq(powers, np.ones_like(y), rcond=None)[0].tolist(), 0.0][:3]
            rises = min(b + 2 * c * least, b + 2 * c * most) > 0
            if most > 1.01 * least and rises and a + b * least + c * least**2 > 0:
                return a, b, c
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum()), 0.0


def step(width: int) -> int:
    """Channels between two widths: those of `prune.Limits` where nothing else is asked."""
    return next(s for s in (8, 4, 2, 1) if s == 1 or width >= 8 * s)


def grid(shape: Shape) -> tuple[list[int], list[int]]:
    """The widths a layer is measured at: every step up to 64 inputs and as many outputs as decide, fewer of more."""
    inputs, outputs = shape["inputs"], shape["outputs"]
    most = outputs if shape["depthwise"] else 8 if shape["kind"] == "linear" else 32
    pace = step(outputs)
    while outputs > most * pace:
        pace *= 2
    found = sorted({*range(pace, outputs + 1, pace), outputs})
    if shape["depthwise"]:
        return [inputs], found
    if inputs <= 64 and shape["kind"] == "conv":
        return sorted({*range(step(inputs), inputs + 1, step(inputs)), inputs}), found
    return sorted({max(1, inputs * share // 64 * 8) for share in (1, 4)} | {inputs}), found


def layer_shapes(model: nn.Module, example: Tensor) -> dict[str, Shape]:
    """What decides each layer's cost: kernel, stride, padding, size of its input, widths."""
    found: dict[str, Shape] = {}

    def record(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, nn.Linear):
            rows = x.numel() // (len(x) * module.in_features)
            found[name] = {"kind": "linear", "rows": rows, "inputs": module.in_features,
                           "outputs": module.out_features, "depthwise": False}  # fmt: skip
            return
        if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
            raise UserError(f"{name}: a latency budget takes 2-d convolutions and linear layers.")
        depthwise = module.groups == module.in_channels > 1
        if module.groups > 1 and not depthwise:
            raise UserError(f"{name}: a latency budget takes no grouped convolution but depthwise ones.")
        found[name] = {
            "kind": "conv", "kernel": list(module.kernel_size), "stride": list(module.stride),
            "padding": list(module.padding), "dilation": list(module.dilation), "size": list(x.shape[2:]),
            "inputs": module.in_channels, "outputs": module.out_channels, "depthwise": depthwise,
        }  # fmt: skip

    hooks = [
        m.register_forward_pre_hook(lambda mod, inputs, n=n: record(n, mod, inputs))
        for n, m in model.named_modules()
        if isinstance(m, (_ConvNd, nn.Linear))
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def pairs(shape: Shape) -> list[tuple[int, int]]:
    """The (inputs, outputs) of the grid, a row of inputs after the other."""
    inputs, outputs = grid(shape)
    return [(o, o) for o in outputs] if shape["depthwise"] else [(i, o) for i in inputs for o in outputs]


def some_cuts(model: nn.Module, example: Tensor, kernels: Cost) -> list[nn.Module]:
    """Copies of ``model``: dense; cut by the same share in every layer; cut to a share of ``kernels``, as budgets are.

    Shares that cannot be had are left out.
    """
    twin, example = copy.deepcopy(model).cpu().eval(), example.cpu()
    cuts = [copy.deepcopy(twin)]
    groups = prune.survey(twin, example).groups
    random = torch.Generator().manual_seed(0)
    scores = [1 + torch.rand(group.units, generator=random) for group in groups]
    costs = prune.CostModel(twin, example)
    wanted = [(prune.Budget("ratio", 1 - share), prune.Limits("uniform", floor=0.0)) for share in EVENLY]
    wanted += [(prune.Budget("cost", share, kernels), prune.Limits()) for share in WEIGHED]
    for budget, limits in wanted if groups else ():
        small, own = copy.deepcopy((twin, groups))
        try:
            prune.shrink(small, own, prune.choose(own, scores, budget, limits, costs=costs))
        except UserError:
            continue
        cuts.append(small)
    return cuts


def networks_ms(
    models: Sequence[nn.Module], example: Tensor, threads: int = 1, activation_bits: int = 8
) -> list[tuple[Mapping[str, prune.Width], float]]:
    """(widths, milliseconds) of every model as exported at 8-bit weights: one sample, timed against one another."""
    example = example.cpu()
    clock = time.process_time if threads == 1 else time.perf_counter
    widths = [prune.CostModel(model, example).dense for model in models]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for index, model in enumerate(models):
            quant.quantize(model, 8, activation_bits, example_input=example)
            quant.calibrate(model, [example])
            files[str(index)] = onnx_export.export(model.eval(), example, Path(folder) / f"{index}.onnx").path
        found = latency.measure(files, threads=threads, runs=RUNS, clock=clock)
    return [(width, found[str(index)]["median_ms"]) for index, width in enumerate(widths)]


def cache_file(threads: int = 1) -> Path:
    """Where this machine's figures are kept: in the user's cache folder (`flatcompress.storage.cache_folder`)."""
    root = cache_folder()
    text = json.dumps([METHOD, threads, machine(), ort.__version__, onnx.__version__], sort_keys=True)
    root.mkdir(parents=True, exist_ok=True)
    return root / f"latency-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def keep(path: Path, found: Figures) -> Figures:
    """Add ``found`` to the file; returns what is there then. What another process put there first stays."""
    there = _load(path)
    layers = {key: own | there["layers"].get(key, {}) for key, own in found["layers"].items()}
    merged = {"layers": there["layers"] | layers, "networks": found["networks"] | there["networks"]}
    if merged != there:
        write_json_atomic(path, merged, "The table before this measurement is kept.")
    return merged


def _load(path: Path) -> Figures:
    """The kept figures; a damaged file's are measured anew."""
    try:
        raw = json.loads(path.read_text())
        layers = {str(k): {str(at): _figure(ms) for at, ms in own.items()} for k, own in raw["layers"].items()}
        networks = {str(k): [[_figure(x), _figure(y)] for x, y in own] for k, own in raw["networks"].items() if own}
        return {"layers": layers, "networks": networks}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {"layers": {}, "networks": {}}


def _figure(raw: Any) -> float:
    value = float(raw)
    if not 0 < value < math.inf:
        raise ValueError(raw)
    return value


def _key(shape: Shape) -> str:
    return json.dumps(shape, sort_keys=True)
