"""`check`: a written file against its target's published rules, and in its tool where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.proof import inspect_file, judging, parity
from flatcompress.onnx_export.proof.samples import Samples, judged
from flatcompress.onnx_export.targets.table import TARGETS, Target
from flatcompress.onnx_export.targets.tools import Tool

FURTHER = 0.01  # of samples: a sum that lies just between two codes may go either way, and be carried to the output
COMPARED = ("samples", "largest_error_steps", "mean_error_steps", "further", "equal_argmax",
            "bit_equal", "decisions", "flips")  # fmt: skip


def check(exported: Exported, batches: Sequence[Any], target: str, agreement: str = "argmax") -> dict[str, Any]:
    """What is known of ``exported`` on ``target``: breaches of its rules, and outputs compared in its tool.

    batches: as `certify` takes them. agreement: the task's, ``argmax`` of classes. The row has ``run`` null and says
    why where the tool is missing or there is none. UserError for an unknown target and for a file of another profile
    than the target's.
    """
    chosen = _target(target)
    if exported.profile != chosen.profile:
        raise UserError(f"target {target!r} reads profile {chosen.profile!r}; this file is {exported.profile!r}.")
    model = inspect_file.load(exported.path)
    row: dict[str, Any] = {
        "name": chosen.name,
        "profile": chosen.profile,
        "rules": chosen.page,
        "lint": [sentence for rule in chosen.rules for sentence in rule(model)],
        "device": chosen.device,
        "run": None,
        "why_not": None,
    }
    row["failures"] = [f"target {target}: {sentence}." for sentence in row["lint"]]
    if chosen.tool is None:
        why = "no tool of this target installs here; the rules were checked, nothing was run"
        floats = (
            "" if PROFILES[chosen.profile]().fused else "; outputs were compared in floats, as ONNX defines the file"
        )
        return {**row, "why_not": why + floats}
    try:
        installed = version(chosen.tool.package)
    except PackageNotFoundError:
        extra = f"flatcompress[{chosen.tool.extra}]"
        return {**row, "why_not": f"{chosen.tool.package} is not installed, nothing was run: pip install '{extra}'"}
    row["run"] = _run(chosen, exported, Samples(exported.reference, batches), agreement)
    row["run"] = {"package": chosen.tool.package, "version": installed, **row["run"]}
    row["failures"] += [f"target {target}, {sentence}" for sentence in row["run"].pop("failures")]
    return row


def judge(certificate: dict[str, Any], exported: Exported, batches: Sequence[Any], target: str, agreement: str) -> None:
    """Put `check`'s row into ``certificate``; what it breaks is a failure, what was not run a warning."""
    row = check(exported, batches, target, agreement)
    certificate["target"] = row
    certificate["failures"] = certificate["failures"] + row["failures"]
    certificate["holds"] = certificate["holds"] and not row["failures"]
    told = [row["why_not"], _floats(target, row["run"] or {})]
    certificate["warnings"] = certificate["warnings"] + [f"target {target}: {words}." for words in told if words]


def _floats(target: str, run: dict[str, Any]) -> str | None:
    """What to say of layers that its tool computes in floats."""
    integer, layers, wanted = run.get("integer_layers"), run.get("layers"), TARGETS[target]()
    if integer is None or integer == layers:
        return None
    why = (
        f"; weights of more than {wanted.weight_bits} bits do that, and zero points inside a range, which "
        "quantizer: lsq does not have, and operators without an integer form there"
    )
    return f"{layers - integer} of {layers} layers compute in floats there{'' if wanted.offsets else why}"


def _target(name: str) -> Target:
    found: Target = TARGETS[name]()
    if found.instead:
        raise UserError(f"target {name!r}: {found.instead}")
    return found


def _run(target: Target, exported: Exported, inputs: Samples, agreement: str) -> dict[str, Any]:
    """Load the file in ``tool`` and compare its outputs with the reference's; what goes wrong there is a failure."""
    tool = target.tool
    assert tool is not None
    output, _ = judged(exported.reference)
    batches = inputs.batches
    if tool.samples is not None and len(inputs) > tool.samples:
        batches = [inputs.chosen(torch.linspace(0, len(inputs) - 1, tool.samples).long())]
    expected = parity.reference_outputs(exported.reference, batches, output)
    step = parity.output_step(parity.reference_outputs(exported.reference, inputs.batches, output))
    try:
        arrays = [tuple(value.numpy() for value in batch) for batch in batches]
        found, how = tool.run(exported.path, inputs.names, arrays, output)
    except Exception as error:  # a foreign runtime may raise anything; that it does is the finding
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return {"loaded": False, "failures": [f"{tool.package} does not run the file ({reason})."]}
    row = judging.compare(expected, found, step, 0.0, agreement)
    row |= {
        "further": int((np.abs(found - expected) > (tool.steps or 1.5) * step).reshape(len(found), -1).any(1).sum())
    }
    return {
        "loaded": True,
        **how,
        **{key: row[key] for key in COMPARED},
        "failures": _failures(tool, exported, row, target),
    }


def _offsets(target: Target) -> str:
    return "" if target.offsets else " Zero points inside a range are not exact there: quantize with quantizer: lsq."


def _failures(tool: Tool, exported: Exported, row: dict[str, Any], target: Target) -> list[str]:
    """Samples further off than the tool allows, but for the few that a rounding boundary explains; other classes."""
    steps, reasons = row["largest_error_steps"], []
    if steps is None:
        return [f"{tool.package}: an output is not finite."]
    if tool.steps is None:
        return []
    if judging.too_many(row["further"], row["samples"], FURTHER):
        count = f"{row['further']} of {row['samples']}"
        reasons.append(f"{tool.package}: {count} outputs are more than {tool.steps} steps from the reference, the "
                       f"largest {steps:.3g}; {FURTHER:.0%} may be.{_offsets(target)}")  # fmt: skip
    if judging.too_many(row["flips"], row["decisions"], judging.FLIPPED):
        count = f"{row['flips']} of {row['decisions']}"
        reasons.append(f"{tool.package}: argmax differs from the reference's on {count} samples; 0.1 % is allowed.")
    wide = [layer["name"] for layer in exported.layers if layer["can_saturate"] or layer["unsigned"]]
    if reasons and wide and tool.package != "onnxruntime":
        reasons.append(f"{', '.join(wide[:8])}: weights beyond 64 saturate in int8 kernels of x86 processors without "
                       "VNNI; quantize with weight_bits of at most 7 and first_last_bits: 7.")  # fmt: skip
    return reasons
