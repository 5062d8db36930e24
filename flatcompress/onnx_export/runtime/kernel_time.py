"""What a layer's integer kernel takes at many widths, by onnxruntime's own profiler.

One session holds the layer at all the widths asked, side by side, each as the exporter writes it (codes,
dequantized weights, the convolution, codes again), so that widths are compared within the same run. It also keeps
the weights as cold as a network does: between two runs of one kernel the weights of all the others pass the cache.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from flatcompress.errors import RunError
from flatcompress.onnx_export.runtime import sessions

SECONDS = 0.25  # per session, beside its making
FEWEST_RUNS, MOST_RUNS, WARM_UP = 12, 40, 2
SESSION_BYTES = 32 << 20  # of weights in one session
_KERNEL = re.compile(r"at_(\d+)_(\d+)(_token_\d+|_nchwc)*_kernel_time")
Width = tuple[int, int]
Shape = Mapping[str, Any]


def kernel_ms(shape: Shape, widths: Sequence[Width], threads: int = 1) -> dict[Width, float]:
    """Milliseconds of the layer of ``shape`` at every (inputs, outputs) of ``widths``.

    shape: {"kind": "linear", "rows"} or {"kind": "conv", "kernel", "stride", "padding", "dilation", "size",
    "depthwise"}. The figure is the mean of the fastest quarter of the runs: what disturbs a run only adds, and a
    kernel of a few microseconds is timed in whole ones. RunError where the profiler does not name the kernels.
    """
    found: dict[Width, float] = {}
    for part in _parts(shape, widths):
        times = _profiled(side_by_side(shape, part), threads)
        unseen = [width for width in part if not times.get(width)]
        if unseen:
            raise RunError(f"onnxruntime {ort.__version__} does not tell what a layer at widths {unseen[0]} takes.")
        found |= {width: _fastest(times[width]) for width in part}
    return found


def _fastest(times: Sequence[float]) -> float:
    mean = statistics.fmean(sorted(times)[: max(3, len(times) // 4)])
    return max(mean, 0.5) / 1e3  # less than a microsecond is written as none


def _parts(shape: Shape, widths: Sequence[Width]) -> list[list[Width]]:
    """Consecutive widths whose weights fit into one session together."""
    parts: list[list[Width]] = []
    room = 0
    for width in widths:
        size = int(np.prod(_weight_shape(shape, width)))
        if not parts or size > room:
            parts.append([])
            room = SESSION_BYTES
        parts[-1].append(width)
        room -= size
    return parts


def kernel_events(model: str | Path | bytes, threads: int = 1, most: int = MOST_RUNS) -> list[dict[str, Any]]:
    """onnxruntime's profile of every kernel in every run of a model, one sample at a time, ``most`` runs at the most:
    {"name", "dur" (in microseconds), "args"}. The first ``WARM_UP`` of a name are of runs that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        handle = sessions.session(model, threads=threads, profile_to=Path(folder) / "profile")
        random = np.random.default_rng(1)
        shapes = {e.name: [d if isinstance(d, int) else 1 for d in e.shape] for e in handle.get_inputs()}
        types = {e.name: e.type for e in handle.get_inputs()}
        feed = {name: sessions.drawn(random, shape, types[name]) for name, shape in shapes.items()}
        fetch = [handle.get_outputs()[0].name]  # all are computed, one is copied
        for _ in range(WARM_UP):
            start = time.process_time()
            handle.run(fetch, feed)
        once = time.process_time() - start
        for _ in range(min(most, max(FEWEST_RUNS, round(SECONDS / max(once, 1e-6))))):
            handle.run(fetch, feed)
        events = json.loads(Path(handle.end_profiling()).read_text())
    return [event for event in events if event["name"].endswith("_kernel_time")]


def _profiled(model: bytes, threads: int) -> dict[Width, list[float]]:
    """Microseconds of every kernel in every run."""
    times: dict[Width, list[float]] = defaultdict(list)
    for event in kernel_events(model, threads):
        match = _KERNEL.fullmatch(event["name"])
        if match:
            times[int(match[1]), int(match[2])].append(event["dur"])
    return {width: seen[WARM_UP:] for width, seen in times.items()}


def side_by_side(shape: Shape, widths: Sequence[Width]) -> bytes:
    """An ONNX graph with the layer of ``shape`` once for every (inputs, outputs), on a shared input per width."""
    random = np.random.default_rng(0)
    constants: dict[str, Any] = {"s": np.float32(0.02), "z": np.uint8(0), "r": np.float32(0.05)}
    nodes: list[NodeProto] = []
    entries: list[ValueInfoProto] = []
    for inputs in dict.fromkeys(inputs for inputs, _ in widths):
        size = [shape["rows"], inputs] if shape["kind"] == "linear" else [1, inputs, *shape["size"]]
        entries.append(helper.make_tensor_value_info(f"x{inputs}", TensorProto.FLOAT, size))
        nodes.append(helper.make_node("QuantizeLinear", [f"x{inputs}", "s", "z"], [f"q{inputs}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{inputs}", "s", "z"], [f"d{inputs}"]))
    for inputs, outputs in widths:
        at = f"{inputs}_{outputs}"
        constants |= {
            f"w{at}": random.integers(-127, 128, _weight_shape(shape, (inputs, outputs)), np.int8),
            f"t{at}": np.full(outputs, 0.01, np.float32), f"n{at}": np.zeros(outputs, np.int8),
            f"b{at}": np.zeros(outputs, np.int32), f"u{at}": np.full(outputs, 2e-4, np.float32),
        }  # fmt: skip
        nodes += _layer(shape, inputs, at)
    results = [helper.make_tensor_value_info(f"o{i}_{o}", TensorProto.UINT8, None) for i, o in widths]
    made = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "layer", entries, results, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _weight_shape(shape: Shape, width: Width) -> list[int]:
    inputs, outputs = width
    if shape["kind"] == "linear":
        return [inputs, outputs]
    return [outputs, 1 if shape["depthwise"] else inputs, *shape["kernel"]]


def _layer(shape: Shape, inputs: int, at: str) -> list[NodeProto]:
    if shape["kind"] == "linear":
        op, axis, keys = "Gemm", 1, {}
    else:
        keys = {"strides": shape["stride"], "pads": shape["padding"] * 2, "dilations": shape["dilation"],
                "group": inputs if shape["depthwise"] else 1}  # fmt: skip
        op, axis = "Conv", 0
    return [
        helper.make_node("DequantizeLinear", [f"w{at}", f"t{at}", f"n{at}"], [f"wd{at}"], axis=axis),
        helper.make_node("DequantizeLinear", [f"b{at}", f"u{at}"], [f"bd{at}"], axis=0),
        helper.make_node(op, [f"d{inputs}", f"wd{at}", f"bd{at}"], [f"y{at}"], name=f"at_{at}", **keys),
        helper.make_node("QuantizeLinear", [f"y{at}", "r", "z"], [f"o{at}"]),
    ]
