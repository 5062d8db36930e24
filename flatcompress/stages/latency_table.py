"""What a layer costs in milliseconds here: measured in onnxruntime per shape, in the form that is exported.

A one-layer int8 graph (QuantizeLinear, Conv, dequantized weights, QuantizeLinear) is what the exporter writes for a
layer, so its kernel's time, as onnxruntime's own profiler gives it, is the layer's. Every layer is measured on a grid
of widths and interpolated between; what is not a convolution or linear layer (residual adds, pooling, the runtime) is
the exported dense model's latency minus its layers', and shrinks with the mean width. Figures are kept on disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import statistics
import tempfile
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcompress import onnx_export, prune, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import latency, sessions
from flatcompress.training.storage import write_json_atomic

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
RUNS = 15
_KERNELS = ("QLinearConv", "QGemm", "Conv", "Gemm", "MatMul", "QLinearMatMul", "ConvInteger")
Shape = dict[str, Any]


class LatencyTable:
    """Milliseconds of ``model`` at any widths: a cost function for `prune.Budget` (kind cost).

    ``example``: input [B, C, H, W]. ``cache``: the JSON file that measured shapes are kept in (None: the user's cache
    folder); it is per processor and onnxruntime version. UserError for layers other than 2-d convolutions and linear.
    """

    def __init__(self, model: nn.Module, example: Tensor, cache: Path | None = None) -> None:
        self.path = cache or cache_file()
        self.known: dict[str, float] = _load(self.path)
        self.shapes = layer_shapes(model, example)
        self.dense = prune.CostModel(model, example).dense
        self._grids = {name: self._grid(shape) for name, shape in self.shapes.items()}
        layers = sum(self._layer(name, self.dense[name]) for name in self.shapes)
        whole = self._whole(model, example)
        # The profiler costs a little per kernel: layers of a few microseconds can add up to more than the whole.
        self.factor, self.rest = min(1.0, whole / layers), max(0.0, whole - layers)
        write_json_atomic(self.path, self.known, "The table before this measurement is kept.")

    def __call__(self, widths: Mapping[str, prune.Width]) -> float:
        """Estimated milliseconds at ``widths`` ({name: Width(inputs, outputs, groups)})."""
        layers = sum(self._layer(name, widths[name]) for name in self.shapes)
        mean = statistics.fmean(widths[n].outputs / self.dense[n].outputs for n in self.shapes)
        return self.factor * layers + self.rest * mean

    def _grid(self, shape: Shape) -> tuple[list[int], list[int], list[list[float]]]:
        inputs, outputs = _steps(shape["inputs"]), _steps(shape["outputs"])
        if shape["depthwise"]:
            return inputs, outputs, _monotone([[self._ms(shape, n, n) for n in outputs]])
        return inputs, outputs, _monotone([[self._ms(shape, i, o) for o in outputs] for i in inputs])

    def _layer(self, name: str, width: prune.Width) -> float:
        inputs, outputs, grid = self._grids[name]
        columns = [_between(outputs, row, width.outputs) for row in grid]
        return columns[0] if len(columns) == 1 else _between(inputs, columns, width.inputs)

    def _ms(self, shape: Shape, inputs: int, outputs: int) -> float:
        key = json.dumps({**shape, "inputs": inputs, "outputs": outputs}, sort_keys=True)
        if key not in self.known:
            self.known[key] = kernel_ms(one_layer(shape, inputs, outputs))
        return self.known[key]

    def _whole(self, model: nn.Module, example: Tensor) -> float:
        text = "".join(f"{n}{tuple(p.shape)}" for n, p in model.named_parameters()) + str(tuple(example.shape[1:]))
        key = "model " + hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = int8_ms(model, example)
        return self.known[key]


def _steps(width: int) -> list[int]:
    return sorted({max(1, math.ceil(width * share)) for share in SHARES})


def _monotone(grid: list[list[float]]) -> list[list[float]]:
    """A narrower layer never costs more than a wider one: at a few microseconds the profiler's clock says otherwise."""
    table = np.array(grid)
    for axis in (0, 1):
        table = np.flip(np.minimum.accumulate(np.flip(table, axis), axis), axis)
    return table.tolist()


def _between(at: list[int], values: list[float], x: int) -> float:
    """Linear interpolation, constant outside."""
    if x <= at[0] or len(at) == 1:
        return values[0]
    if x >= at[-1]:
        return values[-1]
    i = bisect_right(at, x) - 1
    share = (x - at[i]) / (at[i + 1] - at[i])
    return values[i] + share * (values[i + 1] - values[i])


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
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def one_layer(shape: Shape, inputs: int, outputs: int) -> bytes:
    """An ONNX graph of one int8 layer of ``shape`` at these widths."""
    random = np.random.default_rng(0)
    if shape["kind"] == "linear":
        input_shape, weight_shape, op, keys = [shape["rows"], inputs], [inputs, outputs], "Gemm", {}
    else:
        per_group = 1 if shape["depthwise"] else inputs
        input_shape, weight_shape, op = [1, inputs, *shape["size"]], [outputs, per_group, *shape["kernel"]], "Conv"
        keys = {"strides": shape["stride"], "pads": shape["padding"] * 2, "dilations": shape["dilation"],
                "group": inputs if shape["depthwise"] else 1}  # fmt: skip
    weight = random.integers(-127, 128, weight_shape).astype(np.int8)
    constants = {
        "s": np.float32(0.02), "z": np.uint8(0), "w": weight, "t": np.full(outputs, 0.01, np.float32),
        "n": np.zeros(outputs, np.int8), "b": np.zeros(outputs, np.int32), "bt": np.full(outputs, 2e-4, np.float32),
        "r": np.float32(0.05),
    }  # fmt: skip
    axis = 1 if op == "Gemm" else 0
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "t", "n"], ["wd"], axis=axis),
        helper.make_node("DequantizeLinear", ["b", "bt"], ["bd"], axis=0),
        helper.make_node(op, ["xd", "wd", "bd"], ["y"], **keys),
        helper.make_node("QuantizeLinear", ["y", "r", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "r", "z"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def kernel_ms(model: bytes) -> float:
    """Median milliseconds of the layer's own kernel in ``RUNS`` profiled runs, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = sessions.QUIET
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        handle = ort.InferenceSession(model, options, providers=sessions.PROVIDERS)
        entry = handle.get_inputs()[0]
        x = np.random.default_rng(1).random(entry.shape, dtype=np.float32)
        for _ in range(RUNS + 2):
            handle.run(None, {entry.name: x})
        events = json.loads(Path(handle.end_profiling()).read_text())
    times = [e["dur"] for e in events if e.get("args", {}).get("op_name") in _KERNELS and "kernel_time" in e["name"]]
    return statistics.median(times[2:]) / 1000.0


def int8_ms(model: nn.Module, example: Tensor) -> float:
    """Milliseconds of ``model`` as exported at 8 bits, one sample, one thread."""
    twin = copy.deepcopy(model).cpu().eval()
    quant.quantize(twin, 8, 8, example_input=example.cpu())
    quant.calibrate(twin, [example.cpu()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_export.export(twin, example.cpu(), path)
        return latency.measure({"model": path}, runs=RUNS)["model"]["median_ms"]


def cache_file() -> Path:
    """Where this machine's table is kept: under XDG_CACHE_HOME or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatcompress"
    text = json.dumps([sessions.machine(), ort.__version__, onnx.__version__], sort_keys=True)
    root.mkdir(parents=True, exist_ok=True)
    return root / f"latency-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def _load(path: Path) -> dict[str, float]:
    """The kept figures; a damaged file is measured anew."""
    try:
        raw = json.loads(path.read_text())
        return {str(k): float(v) for k, v in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
