"""`certify`: measure an exported file against its torch reference, and write down what was found.

The certificate is JSON beside the model. It holds when

- onnx's full check passes and a default onnxruntime session loads the file;
- with optimizations on, no output is further from the reference than one output step (`parity.STEP`), or else every
  step of the file is the reference's (`stepwise`) and no output is further off than with optimizations off; with
  optimizations off (onnxruntime then convolves dequantized floats, whose sums round differently, and a code that lies
  on a rounding boundary may change) none is further than a step and four times what roundoff may move it by; a plain
  QDQ file, which is for other tools' compilers, is computed in floats with optimizations on too and judged like that;
- of the samples whose argmax changed by more than roundoff explains there are not more than 0.1 %, on or off
  (`judging`; how far roundoff reaches is measured on the reference, see `roundoff`, and stands beside it);
- with profile ``c``, the C model, compiled and run here, gives every output bit that onnxruntime gives;
- with profile ``litert``, the LiteRT file, run here, has not more than 1 % of samples further than 1.5 steps from the
  reference and not more than 0.1 % with another argmax;
- the task metric through onnxruntime differs by at most 0.1 points from the reference's, on samples that roundoff
  does not explain.

A sample of evidence (inputs, labels, reference outputs) is stored beside it, so that `verify` can repeat the
comparison on another machine.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatcompress.environment import machine, versions
from flatcompress.errors import UserError
from flatcompress.onnx_export.c import model as c_model
from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.proof import inspect_file, integers, judging, lite, others, parity, trained
from flatcompress.onnx_export.proof.diverging import first_diverging_layer
from flatcompress.onnx_export.proof.evidence import BYTES, Evidence
from flatcompress.onnx_export.proof.roundoff import EVALUATIONS, HALF, SINGLE, real_operators, roundoff
from flatcompress.onnx_export.proof.samples import Samples, judged
from flatcompress.onnx_export.proof.stepwise import stepwise
from flatcompress.onnx_export.runtime import latency
from flatcompress.onnx_export.runtime.sessions import INTEGER_KERNELS, Kernels, kernels, run, session
from flatcompress.storage import sha256_file, write_output
from flatcompress.tasks import Task, build

SCHEMA = 1


def certify(
    exported: Exported,
    batches: Sequence[Any],
    labels: Sequence[Tensor] | Tensor | None = None,
    *,
    model: torch.nn.Module | None = None,
    task: Task | str | None = None,
    latency_runs: int = 30,
    threads: Sequence[int] = (1,),
    recipe: str | None = None,
    evidence_bytes: int = BYTES,
    write: bool = True,
    require_integer: bool = False,
    integer_time: bool = False,
    evaluations: int = EVALUATIONS,
) -> dict[str, Any]:
    """Measure ``exported`` on ``batches`` and return its certificate; see the module's docstring for when it holds.

    batches: the whole test set, each batch a tensor [B, ...], or a tuple or dictionary of several arguments. Of several
    outputs the one called ``logits``, or else the first real one, is judged; the others may be no further off. labels:
    targets of each batch, or one tensor [N, ...]; without them the metric is null. task: what was learned (default:
    classification). model: the trained model, to say how far file and reference are from it. latency_runs: 0 leaves
    latency out; threads: its. recipe: its text, for a hash. write: ``certificate.json`` and ``evidence.safetensors``
    (``evidence_bytes`` at most). require_integer: floats fail. integer_time: of kernels. evaluations: see `roundoff`.
    """
    learned, proto, inputs = build(task), _checked(exported), Samples(exported.reference, batches)
    truth, found = _labels(labels, len(inputs)), kernels(exported.path)
    output, name = judged(exported.reference)
    reference = parity.reference_outputs(exported.reference, inputs.batches, output)
    measured = _outputs(exported, inputs, output)
    own = None if model is None else trained.outputs(model, batches, output)
    results = {"trained": own, "reference": reference, "file": measured["optimized"]}
    certificate: dict[str, Any] = {
        "schema": SCHEMA,
        "holds": True,
        "failures": [],
        "file": _file(exported, proto),
        "recipe_sha256": None if recipe is None else _text_hash(recipe),
        "versions": used(),
        "machine": machine(),
        "checker": "full",
        "size": _size(exported),
        "kernels": _kernels(found, exported),
        "layers": [{**row, "kernel": found.of.get(row["name"])} for row in exported.layers],
        "parity": _parity(reference, measured, exported, inputs, (output, name), learned.agreement, evaluations),
        "outputs": others.compared(exported, inputs, output),
        "trained": trained.compared(model, exported.reference, batches, output, results, learned.agreement),
        "integer": _integer(exported, found, integer_time),
        "metric": _metric(reference, measured, truth, own, learned),
        "latency": _latency(exported.path, latency_runs, threads),
    }
    certificate |= {} if learned.plain else {"task": learned.described()}
    certificate |= _companions(exported, certificate["parity"], inputs, output, measured, reference, learned)
    certificate["failures"] = _failures(certificate, reference, measured["optimized"], truth, learned)
    _warn(certificate, exported.profile, require_integer)
    certificate["holds"] = not certificate["failures"]
    if write:
        _store(exported.path, certificate, _evidence(inputs, reference, truth).capped(evidence_bytes), output, learned)
    return certificate


def _companions(
    exported: Exported,
    both: dict[str, Any],
    inputs: Samples,
    output: int,
    measured: dict[str, NDArray[np.float32]],
    reference: NDArray[np.float32],
    task: Task,
) -> dict[str, Any]:
    """Sections of what was written beside the ONNX file."""
    found: dict[str, Any] = {}
    if exported.c is not None:
        found["c"] = _c(exported.c, both, inputs, measured, reference, task)
    if exported.litert is not None:
        found["litert"] = lite.section(exported.litert, inputs, output, reference, task.agreement)
    return found


def _c(
    model: c_model.CModel,
    both: dict[str, Any],
    inputs: Samples,
    measured: dict[str, NDArray[np.float32]],
    reference: NDArray[np.float32],
    task: Task,
) -> dict[str, Any]:
    held = _held(both, task.agreement)
    return c_model.section(model, inputs.joined()[0].numpy(), measured["optimized"], reference, held)


def _held(both: dict[str, Any], agreement: str) -> c_model.Judged:
    """How a C model with steps on real values is judged: by the limits of the file without optimizations."""
    slack = both["unoptimized"]["roundoff_steps"] * both["step"]

    def judged(ours: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[dict[str, Any], list[str]]:
        row = judging.compare(ours, found, both["step"], slack, agreement)
        return row, judging.failures(row, row, fused=False)[:1]

    return judged


def _checked(exported: Exported) -> onnx.ModelProto:
    proto = inspect_file.load(exported.path)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _warn(certificate: dict[str, Any], profile: str, required: bool) -> None:
    """Layers that compute in floats are a warning, or a failure where integers are ``required``; so is, as a warning
    alone, a distance from the trained model that rounding does not explain.
    """
    floats = integers.sentence(certificate["integer"])
    certificate["warnings"] = [floats] if floats and not required else []
    certificate["warnings"] += [told] if (told := trained.sentence(certificate["trained"])) else []
    if required:
        certificate["failures"] += integers.required(certificate["integer"], profile)


def _failures(
    certificate: dict[str, Any],
    reference: NDArray[np.float32],
    found: NDArray[np.float32],
    truth: NDArray[Any] | None,
    task: Task,
) -> list[str]:
    """Why a certificate does not hold: one sentence each."""
    both = certificate["parity"]
    reasons = judging.failures(both["optimized"], both["unoptimized"], both.get("stepwise"), fused=both["fused"])
    if truth is not None:
        slack = both["optimized"]["roundoff_steps"] * both["step"]
        reasons += judging.metric_failure(reference, found, truth, slack, task)
    if reasons:
        reasons += judging.saturation(certificate["kernels"]["can_saturate"], both["optimized"])
    reasons += c_model.failures(certificate["c"]) if "c" in certificate else []
    narrow = PROFILES[certificate["file"]["profile"]]().litert == 4
    reasons += lite.failures(certificate["litert"], narrow) if "litert" in certificate else []
    return reasons + others.failures(certificate["outputs"])


def _labels(labels: Sequence[Tensor] | Tensor | None, samples: int) -> NDArray[Any] | None:
    """int64 of whole numbers, float32 of others, [N, ...]."""
    if labels is None:
        return None
    joined = (labels if isinstance(labels, Tensor) else torch.cat([label.detach() for label in labels])).cpu()
    if len(joined) != samples:
        raise UserError(f"{len(joined)} labels for {samples} samples.")
    return (joined.float() if joined.is_floating_point() else joined.long()).numpy()


def _outputs(exported: Exported, inputs: Samples, output: int) -> dict[str, NDArray[np.float32]]:
    batches, path, fused = inputs.arrays(), exported.path, PROFILES[exported.profile]().fused
    return {
        "optimized": run(session(path, fused=fused), batches, output),
        "unoptimized": run(session(path, optimized=False), batches, output),
    }


def _evidence(inputs: Samples, reference: NDArray[np.float32], truth: NDArray[np.int64] | None) -> Evidence:
    values = {name: value.numpy() for name, value in zip(inputs.names, inputs.joined())}
    if len(values) == 1:
        return Evidence(next(iter(values.values())), reference, truth)
    whole = {name: value for (name, value), batched in zip(values.items(), inputs.batched) if batched}
    return Evidence(whole, reference, truth, {n: v for n, v in values.items() if n not in whole})


def used() -> dict[str, str]:
    """The versions of everything that has a part in the figures."""
    packages = versions("flatcompress", "torch", "onnx", "onnxruntime", "numpy")
    return {"python": platform.python_version(), **packages}


def _file(exported: Exported, proto: onnx.ModelProto) -> dict[str, Any]:
    return {
        "name": exported.path.name,
        "sha256": sha256_file(exported.path),
        "bytes": exported.path.stat().st_size,
        "profile": exported.profile,
        "opset": exported.opset,
        "ir_version": proto.ir_version,
    }


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _size(exported: Exported) -> dict[str, Any]:
    weights = sum(row["bytes"] for row in exported.layers)
    return {
        "bytes": exported.bytes,
        "theoretical_bytes": exported.theoretical_bytes,
        "theoretical": "bits per weight, or one mask bit per weight and bits per non-zero, the smaller per layer",
        "weight_bytes": weights,
        "graph_bytes": exported.bytes - weights,
        "ratio": round(exported.bytes / exported.theoretical_bytes, 4) if exported.theoretical_bytes else None,
    }


def _kernels(found: Kernels, exported: Exported) -> dict[str, Any]:
    layers, expected = exported.layers, PROFILES[exported.profile]().integer_kernels
    integer = [row["name"] for row in layers if found.of.get(row["name"]) in INTEGER_KERNELS]
    quantized = [row["name"] for row in layers if row["activation_bits"] is not None]
    floating = [row["name"] for row in layers if row["name"] not in integer]
    return {
        "counts": found.counts,
        "integer_kernels": found.integer,
        "layers": len(layers),
        "integer_layers": len(integer),
        "not_integer": floating,
        "can_saturate": [row["name"] for row in layers if row["can_saturate"]],
        "rounds": real_operators(exported.reference) if expected else [],
        "not_integer_inside": [name for name in quantized[1:-1] if expected and name in floating],
    }


def _parity(
    reference: NDArray[np.float32],
    measured: dict[str, NDArray[np.float32]],
    exported: Exported,
    inputs: Samples,
    which: tuple[int, str],
    agreement: str,
    evaluations: int,
) -> dict[str, Any]:
    (output, title), step, profile = which, parity.output_step(reference), PROFILES[exported.profile]()
    codes, unit = profile.integer_kernels, SINGLE if profile.floats is np.float32 else HALF
    compared: dict[str, Any] = {}
    for name, found in measured.items():
        floats = name == "unoptimized" or not codes
        options: dict[str, Any] = {"output": output, "evaluations": evaluations, "known": reference}
        slack = roundoff(exported.reference, inputs, floats=floats, unit=unit, **options)
        compared[name] = judging.compare(reference, found, step, slack, agreement)
    if codes and not judging.within(compared["optimized"]):
        compared["stepwise"] = stepwise(exported, inputs, output, step)
    differing = None
    if compared["optimized"]["bit_equal"] != 1.0 and codes:
        differing = first_diverging_layer(exported, inputs.batches[0])
    return {
        "output": title,
        "step": step,
        "step_definition": parity.STEP,
        "fused": profile.fused,
        **compared,
        "first_diverging_layer": differing,
    }


def _metric(
    reference: NDArray[np.float32],
    measured: dict[str, NDArray[np.float32]],
    truth: NDArray[Any] | None,
    own: NDArray[np.float32] | None,
    task: Task,
) -> dict[str, Any]:
    same = None if own is None else parity.compare(own, reference, 1.0, task.agreement)["equal_argmax"]
    row: dict[str, Any] = {"name": task.selects, "samples": len(reference), "trained_agreement": same}
    if not task.plain:
        row |= {"higher": bool(task.metric.higher), "share": task.metric.share}
    if truth is None:
        return {**row, "onnxruntime": None, "reference": None, "trained": None, "difference": None}
    outputs = {"onnxruntime": measured["optimized"], "reference": reference, "trained": own}
    by = {who: {} if found is None else parity.metrics(task, found, truth) for who, found in outputs.items()}
    row |= _side_by_side(by, task.selects)
    others = {name: _side_by_side(by, name) for name in task.reported if name != task.selects}
    return {**row, "others": others} if others else row


def _side_by_side(by: dict[str, dict[str, float | None]], name: str) -> dict[str, float | None]:
    """A metric of the file, the reference and the trained model, and what the first two differ by."""
    row = {who: values.get(name) for who, values in by.items()}
    found, expected = row["onnxruntime"], row["reference"]
    return {**row, "difference": None if found is None or expected is None else found - expected}


def _integer(exported: Exported, found: Kernels, timed: bool) -> dict[str, Any]:
    expected = PROFILES[exported.profile]().integer_kernels and PROFILES[exported.profile]().integer
    return integers.verdict(exported.reference, found, exported.path if timed and expected else None, expected)


def _latency(path: Path, runs: int, threads: Sequence[int]) -> dict[str, Any] | None:
    if not runs:
        return None
    figures = {str(n): latency.measure({"file": path}, threads=n, runs=runs)["file"] for n in threads}
    return {"method": latency.METHOD, "runs": runs, "batch": 1, "threads": figures}


def _store(path: Path, certificate: dict[str, Any], evidence: Evidence, output: int, task: Task) -> None:
    """Evidence first: a certificate that exists names files that exist."""
    kept = path.with_name("evidence.safetensors")
    write_output(kept, evidence.to_bytes())
    value = None
    if evidence.label is not None:
        single = isinstance(evidence.input, np.ndarray)
        parts = [evidence.input] if single else evidence.parts(len(evidence))
        value = parity.metrics(task, run(session(path), parts, output), evidence.label)[task.selects]
    certificate["evidence"] = {
        "name": kept.name,
        "sha256": sha256_file(kept),
        "samples": len(evidence),
        task.selects: value,
    }
    text = json.dumps(certificate, indent=1, allow_nan=False)
    write_output(path.with_name("certificate.json"), text.encode())
