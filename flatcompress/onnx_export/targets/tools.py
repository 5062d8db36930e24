"""Packages that load a file here: each a function of path, batches and output number, imported when it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.litert import model as litert_model
from flatcompress.onnx_export.runtime import sessions

Batches = Sequence[tuple[NDArray[Any], ...]]
Ran = tuple[NDArray[np.float32], dict[str, Any]]
Run = Callable[[Path, list[str], Batches, int], Ran]


@dataclass(frozen=True)
class Tool:
    """``package``: what is installed, ``extra``: of flatcompress, that installs it. ``run``: (file, names of its
    inputs, batches, output number) -> (outputs [N, ...], what is known of the run: ``how`` they were computed, in
    words; ``integer_layers`` of ``layers`` where the tool tells). ``samples``: at most so many, where it is slow.
    ``steps``: how far from the reference an output may be; None where its arithmetic is another by design.
    """

    package: str
    extra: str | None
    run: Run
    samples: int | None = None
    steps: float | None = 1.5


def onnxruntime(path: Path, names: list[str], batches: Batches, output: int) -> Ran:
    """The default session of the CPU provider."""
    return sessions.run(sessions.session(path), batches, output), {"how": "CPUExecutionProvider"}


def openvino(path: Path, names: list[str], batches: Batches, output: int) -> Ran:
    """The CPU plugin, in float32 where it does not compute on integers (its default on some processors is bfloat16)."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = [compiled(dict(zip(names, batch)))[output] for batch in batches]
    kinds = [str(op.get_rt_info()["primitiveType"].astype(str)) for op in compiled.get_runtime_model().get_ops()
             if str(op.get_rt_info()["layerType"].astype(str)) in ("Convolution", "FullyConnected")]  # fmt: skip
    integer = sum("I8" in kind for kind in kinds)
    how = f"CPU plugin, {integer} of {len(kinds)} layers on integers"
    return np.concatenate(results), {"how": how, "integer_layers": integer, "layers": len(kinds)}


def qonnx(path: Path, names: list[str], batches: Batches, output: int) -> Ran:
    """qonnx's own execution, after its cleaning."""
    from qonnx.core import onnx_exec
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    model = ModelWrapper(str(path))
    for name in names:
        model.set_tensor_shape(name, [1, *model.get_tensor_shape(name)[1:]])
    model = cleanup_model(model)
    result, names = model.graph.output[output].name, [value.name for value in model.graph.input]  # cleaning renames
    rows = [onnx_exec.execute_onnx(model, sample)[result] for sample in _one_by_one(names, batches)]
    return np.concatenate(rows), {"how": "qonnx.core.onnx_exec, cleaned"}


def litert(path: Path, names: list[str], batches: Batches, output: int) -> Ran:
    """The LiteRT file beside the ONNX file, in the default interpreter."""
    return litert_model.run(litert_model.place(path), names, batches, output)


def qnn(path: Path, names: list[str], batches: Batches, output: int) -> Ran:
    """The QNN provider's HTP backend, which on x86 is Qualcomm's emulation of the processor; one sample at a time."""
    import onnxruntime as ort
    import onnxruntime_qnn as provider

    name = "QNN"
    if name not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(name, provider.get_library_path())
    device = [device for device in ort.get_ep_devices() if device.ep_name == name][:1]
    options = ort.SessionOptions()
    options.log_severity_level = sessions.QUIET
    options.add_free_dimension_override_by_name("batch", 1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices(device, {"backend_path": provider.get_qnn_htp_path()})
    session = ort.InferenceSession(str(path), options)
    rows = [session.run(None, sample)[output] for sample in _one_by_one(names, batches)]
    return np.concatenate(rows), {"how": f"emulated HTP, {_assigned(session, name)}"}


def _one_by_one(names: list[str], batches: Batches) -> Iterator[dict[str, NDArray[Any]]]:
    """Batches of one, by the inputs' names."""
    for batch in batches:
        for i in range(len(batch[0])):
            yield {name: values[i : i + 1] for name, values in zip(names, batch)}


def _assigned(session: Any, name: str) -> str:
    """How much of the graph the provider took."""
    parts = session.get_provider_graph_assignment_info()
    counts = {part.ep_name: 0 for part in parts}
    for part in parts:
        counts[part.ep_name] += len(part.get_nodes())
    return f"{counts.get(name, 0)} of {sum(counts.values())} operators there"
