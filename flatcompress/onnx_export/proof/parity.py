"""Two sets of outputs compared in output quantization steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flatcompress.onnx_export.lower import integer
from flatcompress.tasks import Task
from flatcompress.tasks.agreement import AGREEMENTS

STEP = (
    "a 255th of the range of the reference outputs over all test samples, which is one step of an 8-bit output "
    "quantizer: the file's own output is not quantized"
)


def output_step(reference: NDArray[np.float32]) -> float:
    """One output step; see `STEP`."""
    span = float(reference.max() - reference.min()) if reference.size else 0.0
    return span / 255 if span > 0 else 1.0


def compare(
    reference: NDArray[np.float32], found: NDArray[np.float32], step: float, agreement: str = "argmax"
) -> dict[str, Any]:
    """Largest error in steps, share of equal argmax, share of samples that are equal bit for bit.

    ``agreement``: what is decided (`tasks.agreement`); the share of equal argmax is null for numbers.
    """
    decide = AGREEMENTS[agreement]
    equal = None if decide is None else float((decide(reference).argmax(-1) == decide(found).argmax(-1)).mean())
    error = np.abs(reference.astype(np.float64) - found.astype(np.float64)) / step
    rows = reference.shape[0]
    return {
        "samples": rows,
        "largest_error_steps": _number(error.max()),
        "mean_error_steps": _number(error.mean()),
        "equal_argmax": equal,
        "bit_equal": float((reference == found).reshape(rows, -1).all(1).mean()),
    }


def _number(value: Any) -> float | None:
    """A float for JSON; null when it is none (an output that is not finite)."""
    return float(value) if np.isfinite(value) else None


_CHUNK = 256


def statistics(task: Task, outputs: NDArray[np.float32], targets: NDArray[Any]) -> dict[str, Tensor]:
    """Every metric's row of statistics per sample, float64 [N, k], by name."""
    pairs = [
        (torch.from_numpy(outputs[i : i + _CHUNK]), torch.from_numpy(targets[i : i + _CHUNK]))
        for i in range(0, len(outputs), _CHUNK)
    ]
    return {
        name: torch.cat([metric.rows(output, y).double() for output, y in pairs])
        for name, metric in task.reported.items()
    }


def metrics(task: Task, outputs: NDArray[np.float32], targets: NDArray[Any]) -> dict[str, float | None]:
    """The task's metrics by name; null where one is not defined on these targets."""
    found = statistics(task, outputs, targets)
    return {name: _number(metric.finish(found[name])) for name, metric in task.reported.items()}


class _Recorder(fx.Interpreter):
    """Runs a reference and keeps the codes that each integer layer puts out."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.codes: dict[str, NDArray[np.uint8]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            grid = getattr(module, "out_grid", None) or getattr(module, "grid", None)
            if grid is not None and not isinstance(module, integer.Dequantize):
                self.codes[n.name] = result.cpu().numpy().astype(np.uint8)
        return result


def reference_codes(
    reference: fx.GraphModule, batch: torch.Tensor | Sequence[torch.Tensor]
) -> dict[str, NDArray[np.uint8]]:
    """{node of the reference: codes} in order, for one batch: a tensor, or one per input."""
    recorder = _Recorder(reference)
    with torch.no_grad():
        recorder.run(*_inputs(batch))
    return recorder.codes


def reference_outputs(
    reference: torch.nn.Module, batches: Sequence[torch.Tensor | Sequence[torch.Tensor]], index: int = 0
) -> NDArray[np.float32]:
    """The reference's outputs for every batch, joined; of several the one at ``index``."""
    with torch.no_grad():
        results = [reference(*laid(reference, _inputs(batch))) for batch in batches]
    chosen = [result[index] if isinstance(result, tuple | list) else result for result in results]
    return np.concatenate([output.cpu().numpy() for output in chosen])


_EXACT = (integer.Rounded, integer.Quantize, integer.Dequantize, integer.ClampCodes, integer.Table)


def is_exact(reference: torch.nn.Module) -> bool:
    """Whether every result of a reference is the same bits in whatever order sums are taken and samples come.

    So it is where all that is computed is integers, and real numbers one product from them.
    """
    if not isinstance(reference, fx.GraphModule):
        return False
    codes: set[fx.Node] = set()
    for node in reference.graph.nodes:
        if node.op == "call_module":
            module = reference.get_submodule(str(node.target))
            if not isinstance(module, _EXACT):
                return False
            if not isinstance(module, integer.Dequantize) and getattr(module, "out_grid", module) is not None:
                codes.add(node)
        elif node.op == "call_function" and "size" not in node.meta:  # it moves codes, or computes
            if not any(source in codes for source in node.all_input_nodes):
                return False
            codes.add(node)
    return True


def laid(reference: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """``inputs`` with channels last where an exact reference has depthwise convolutions: half their time."""
    deep = any(getattr(module, "attributes", {}).get("groups", 1) > 1 for module in reference.modules())
    if not deep or not is_exact(reference):
        return inputs
    return [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]


def _inputs(batch: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return (batch,) if isinstance(batch, torch.Tensor) else batch
