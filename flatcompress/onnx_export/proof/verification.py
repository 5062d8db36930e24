"""`verify`: repeat a certificate's comparison here, on this machine, with this onnxruntime.

The files are compared by hash, so one flipped bit is found, and the model is run again on the stored evidence with
optimizations on and off. Nothing that a file names is imported or opened but the two files beside the certificate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from flatcompress.environment import machine
from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.proof import inspect_file, judging, parity, signature
from flatcompress.onnx_export.proof.certificate import used
from flatcompress.onnx_export.proof.evidence import Evidence, read
from flatcompress.onnx_export.proof.reading import certificate_of, read_certificate
from flatcompress.onnx_export.runtime.sessions import kernels, run, session
from flatcompress.storage import sha256_file
from flatcompress.tasks import TASKS, Task, build
from flatcompress.tasks.agreement import read_agreement


@dataclass
class Verification:
    """``holds`` without ``failures``; ``notes`` say what is different here and does no harm."""

    path: Path
    certificate: dict[str, Any]
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """True when nothing failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": str(self.path),
            "holds": self.holds,
            "failures": self.failures,
            "notes": self.notes,
            "measured": self.measured,
            "versions": used(),
            "machine": machine(),
        }


def verify(path: str | Path, key: str | Path | None = None) -> Verification:
    """Check a run folder, an ONNX file or a certificate against what it claims, here.

    ``key``: a PEM file with a public key; ``model.sig`` must then be the signature of its owner (`sign`). UserError
    when there is nothing to check: no such path, no certificate, or one that is no certificate. What does not hold is
    in the result's ``failures``.
    """
    where = certificate_of(Path(path))
    certificate = read_certificate(where)
    result = Verification(where, certificate)
    if not certificate["holds"]:
        result.failures.append("the certificate itself says that it does not hold: " + _reasons(certificate))
    model = _beside(result, certificate["file"], "model")
    kept = _beside(result, certificate["evidence"], "evidence")
    if isinstance(certificate.get("litert"), dict):
        _beside(result, certificate["litert"], "LiteRT file")
    _judge_signature(result, key)
    _note_versions(result)
    if model is not None and kept is not None:
        _replay(result, model, kept)
    return result


def _judge_signature(result: Verification, key: str | Path | None) -> None:
    folder = result.path.parent
    if key is None:
        if (folder / signature.NAME).is_file():
            result.notes.append(f"{signature.NAME} was not checked: give the signer's public key.")
        return
    wrong = signature.check(folder, result.certificate, key)
    if wrong is None:
        result.notes.append(f"{signature.NAME} is the signature of the owner of {key}.")
    else:
        result.failures.append(wrong)


def _reasons(certificate: dict[str, Any]) -> str:
    reasons = certificate.get("failures")
    return " ".join(str(r)[:300] for r in reasons[:5]) if isinstance(reasons, list) and reasons else "no reason given."


def _beside(result: Verification, claim: dict[str, Any], what: str) -> Path | None:
    """The named file in the certificate's own folder, when its hash is the one claimed."""
    name, digest = claim.get("name"), claim.get("sha256")
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        result.failures.append(f"the {what}'s name {str(name)[:80]!r} is not a plain file name; it is not opened.")
        return None
    path = result.path.with_name(name)
    if not path.is_file() or path.is_symlink():
        result.failures.append(f"{path}: the {what} is missing (or a link).")
        return None
    found = sha256_file(path)
    if found != digest:
        result.failures.append(
            f"{path}: the {what} is not the one that was certified (sha256 {found[:12]}..., certified "
            f"{str(digest)[:12]}..., {path.stat().st_size} bytes, certified {claim.get('bytes', 'unknown')})."
        )
    return path


def _note_versions(result: Verification) -> None:
    claimed = result.certificate.get("versions")
    there = claimed.get("onnxruntime") if isinstance(claimed, dict) else None
    if there != ort.__version__:
        result.notes.append(f"certified with onnxruntime {str(there)[:40]}, verified with {ort.__version__}.")


def _replay(result: Verification, model: Path, kept: Path) -> None:
    try:
        proto = inspect_file.load(model)
        evidence = read(kept)
        onnx.checker.check_model(proto, full_check=True)
        _check_shape(model, proto, evidence)
        judged = result.certificate["parity"].get("output")
        outputs = {
            "optimized": _outputs(session(model, fused=_fused(result)), evidence, judged),
            "unoptimized": _outputs(session(model, optimized=False), evidence, judged),
        }
    except UserError as error:
        result.failures.append(str(error))
        return
    except Exception as error:  # the checker and a running model raise whatever they meet in a damaged file
        result.failures.append(f"{model}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        return
    _judge(result, evidence, outputs)
    _judge_kernels(result, model)


def _fused(result: Verification) -> bool:
    """Whether the certified file is for onnxruntime's integer kernels."""
    profile = result.certificate["file"].get("profile")
    return not (isinstance(profile, str) and profile in PROFILES) or bool(PROFILES[profile]().fused)


def _check_shape(path: Path, proto: onnx.ModelProto, evidence: Evidence) -> None:
    """The file takes what the evidence has: inputs of one's names with the other's sizes."""
    stored = {t.name for t in proto.graph.initializer}
    fed = {value.name: value for value in proto.graph.input if value.name not in stored}
    held = {**evidence.inputs, **evidence.fixed}
    if isinstance(evidence.input, np.ndarray) and len(fed) == 1:  # a foreign file's only input has any name
        held = {next(iter(fed)): evidence.input}
    if set(fed) != set(held):
        raise UserError(f"{path}: {len(fed)} inputs ({_names(fed)}); the evidence is of {len(held)} ({_names(held)}).")
    for name, value in fed.items():
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        shape, skipped = held[name].shape, int(name not in evidence.fixed)
        fits = len(sizes) == len(shape) and all(s in (0, f) for s, f in zip(sizes[skipped:], shape[skipped:]))
        if (value.type.tensor_type.elem_type == onnx.TensorProto.INT64) != (held[name].dtype == np.int64):
            raise UserError(f"{path}: its {_what(name)} type is not the evidence's {held[name].dtype}.")
        if not fits:
            raise UserError(f"{path}: its {_what(name)} shape {sizes} does not take the evidence's {list(shape)}.")


def _what(name: str) -> str:
    return "input" if name == "input" else f"input {name[:80]!r}:"


def _names(values: Iterable[str]) -> str:
    return ", ".join(name[:40] for name in sorted(values)[:8])


def _outputs(handle: ort.InferenceSession, evidence: Evidence, judged: object) -> np.ndarray:
    """The judged output: the one of that name, or the first."""
    names = [entry.name for entry in handle.get_outputs()]
    index = names.index(judged) if isinstance(judged, str) and judged in names else 0
    parts = evidence.parts()
    single = isinstance(evidence.input, np.ndarray)
    return run(handle, [part["input"] for part in parts] if single else parts, index)


def _judge(result: Verification, evidence: Evidence, outputs: dict[str, np.ndarray]) -> None:
    claimed = result.certificate["parity"].get("step")
    agreement, task = read_agreement(result.certificate.get("task")), _task(result)
    step = claimed if _positive(claimed) else parity.output_step(evidence.reference)
    slack = {name: _roundoff(result, name) * step for name in outputs}
    for name, found in outputs.items():
        if found.shape != evidence.reference.shape:
            result.failures.append(f"{name}: output shape {found.shape}, evidence {evidence.reference.shape}.")
            return
        result.measured[name] = judging.compare(evidence.reference, found, step, slack[name], agreement)
    steps = result.certificate["parity"].get("stepwise")
    proved = {"holds": True} if isinstance(steps, dict) and steps.get("holds") is True else None
    both = result.measured["optimized"], result.measured["unoptimized"]
    result.failures += judging.failures(*both, proved, fused=_fused(result))
    if evidence.label is not None and task is not None:
        _judge_metric(result, evidence, outputs["optimized"], slack["optimized"], task)
    if result.failures:
        result.failures += judging.saturation(
            result.certificate["kernels"].get("can_saturate"), result.measured["optimized"]
        )


def _judge_metric(result: Verification, evidence: Evidence, found: np.ndarray, slack: float, task: Task) -> None:
    assert evidence.label is not None
    try:
        here, there = (parity.metrics(task, out, evidence.label) for out in (found, evidence.reference))
        result.failures += judging.metric_failure(evidence.reference, found, evidence.label, slack, task)
    except (RuntimeError, ValueError, IndexError) as error:
        result.failures.append(f"the evidence's targets are not those of task {task.name!r} ({str(error)[:200]}).")
        return
    for name in here:
        row = {"samples": len(evidence), "onnxruntime": here[name], "reference": there[name]}
        result.measured[name] = row


def _task(result: Verification) -> Task | None:
    """The task that the certificate names, whose metric is measured again; None, with a note, for one's own."""
    described = result.certificate.get("task")
    if described is None:
        return build()
    keys = {k: v for k, v in described.items() if k != "output"} if isinstance(described, dict) else {}
    name = keys.get("name")
    try:
        if isinstance(name, str) and name in TASKS:
            known = TASKS[name].defaults
            return build({"name": name, **{k: v for k, v in keys.items() if k in known}})
    except UserError as error:
        result.failures.append(f"the certificate's task: {error}")
        return None
    result.notes.append(f"task {str(name)[:60]!r} is not known here: outputs are compared, its metric is not measured.")
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")


def _roundoff(result: Verification, name: str) -> float:
    """What the certificate says that roundoff may do, in steps; none where it says nothing that could be true."""
    row = result.certificate["parity"].get(name)
    claimed = row.get("roundoff_steps") if isinstance(row, dict) else None
    if not isinstance(claimed, float) or not 0 <= claimed < float("inf"):
        result.notes.append(f"{name}: the certificate does not say what roundoff may do; nothing is allowed for it.")
        return 0.0
    return claimed


def _judge_kernels(result: Verification, model: Path) -> None:
    here, there = kernels(model), result.certificate["kernels"].get("integer_kernels")
    result.measured["integer_kernels"] = here.integer
    if here.integer != there:
        result.notes.append(
            f"{here.integer} integer kernels after optimization here, {str(there)[:20]} when certified."
        )
