"""One call from a trained network to a verified file: it writes a recipe and runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatcompress import onnx_export
from flatcompress.compressing.inputs import Inputs, with_targets
from flatcompress.compressing.options import BITS, stages
from flatcompress.errors import UserError
from flatcompress.pipeline import Pipeline, Result
from flatcompress.prune import NothingPruned
from flatcompress.training.batches import evaluate


@dataclass(frozen=True)
class Compressed:
    """What `compress` made. ``rows``: before and after; ``notes``: what was decided; ``recipe``: repeats it."""

    folder: Path
    onnx: Path
    recipe: Path
    report: Path | None
    certificate: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        paths = {k: None if (p := getattr(self, k)) is None else str(p) for k in ("folder", "onnx", "recipe", "report")}
        return {**paths, "holds": self.certificate["holds"], "rows": self.rows, "notes": self.notes}


def compress(
    model: str,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    bits: str = "8",
    keep: float | None = None,
    max_drop: float | None = None,
    epochs: int = 0,
    budget: str | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    target: str | None = None,
    task: str | None = None,
    display: Callable[[dict[str, Any]], None] | None = None,
) -> Compressed:
    """Quantize ``model`` without training (``epochs`` 0) or with it, and write a verified file.

    model: as in a recipe (built-in, ``timm:NAME``, ``torchvision:NAME``, ``transformers:TYPE``, ``onnx:FILE``,
    ``package.module:factory``), or an ``.onnx`` file. data: a folder of images (class folders are labels where there
    are as many as classes), an ``.npz`` with labels or without, an ``.npy``, or nothing. Without labels the float
    network's own classes take their place, so that accuracy reads as agreement with it. bits: a key of `BITS`, or
    ``auto``: by sensitivity, 4 a weight on average or within ``budget``. budget: bytes of the weights (``500kB``), or
    with ``epochs`` milliseconds (``3ms``), met by cutting channels. keep: share of the channels, with ``epochs``.
    max_drop: points of validation accuracy, without. target: what the file is for (`flatcompress list targets`), which
    sets scheme and profile. task: what the network does where that is no classification (`flatcompress list tasks`);
    data is then an ``.npz`` with targets. pretrained: the library's own weights (a download). mean, std: of the
    images, on pixels in 0..1. out: the run folder (default ``runs/MODEL``). input_shape: (C, H, W) where the model does
    not say it. display: receives the run's events. UserError before anything runs; a certificate that does not hold is
    in the result.
    """
    todo = stages(bits, keep, max_drop, epochs, budget, target)
    section, notes = _section(model, weights, pretrained)
    folder = Path(out) if out is not None else Path("runs") / (re.sub(r"\W+", "-", Path(model).stem).strip("-") or "x")
    inputs = Inputs(
        section, folder.with_name(f"{folder.name}-inputs.npz"), classes, input_shape, mean, std, seed, notes
    )
    given = Path(data).expanduser() if data is not None else None
    learned = None if task in (None, "classification") else task
    source = inputs.read(given) if learned is None else with_targets(given, learned)
    where: dict[str, Any] = {"name": folder.name, "output_dir": str(folder.parent), "seed": seed, "task": learned}
    pipeline = Pipeline(section, {**source, "batch_size": 32}, todo, **where)
    try:
        result = pipeline.run(folder, restart=True, display=display)
    except UserError as error:
        if budget is None or not _met_already(error):
            raise
        notes.append(f"budget {budget}: the network is within it as it is, nothing was cut.")
        todo = [stage for stage in todo if "prune" not in stage]
        pipeline = Pipeline(section, {**source, "batch_size": 32}, todo, **where)
        result = pipeline.run(folder, restart=True, display=display)
    notes += _of_target(target, bits, result.certificate or {})
    assert result.onnx is not None and result.certificate is not None
    return Compressed(folder, result.onnx, folder / "recipe.yaml", result.report, result.certificate,
                      _rows(pipeline, result, inputs.agreement), notes)  # fmt: skip


def _of_target(target: str | None, bits: str, certificate: dict[str, Any]) -> list[str]:
    """What the target made of the request, and what of the table was not measured there."""
    if target is None:
        return []
    widest, found = onnx_export.TARGETS[target]().weight_bits, certificate.get("target") or {}
    notes = [
        f"target {target}: weights have {widest} bits at most; wider ones saturate in its kernels on x86 processors "
        "without VNNI, or run in floats."
    ] if bits.lower() in BITS and BITS[bits.lower()][0] > widest else []  # fmt: skip
    ran = found.get("run") or {}
    if ran:
        notes.append(f"target {target}: {ran['package']} {ran['version']}, {ran.get('how', 'did not load the file')}, "
                     f"equal class on {ran.get('equal_argmax', 0.0):.2%} of {ran.get('samples', 0)}, "
                     f"at most {ran.get('largest_error_steps') or float('nan'):.2g} output steps away.")  # fmt: skip
    else:
        notes.append(f"target {target}: {found.get('why_not')}.")
    return [*notes, f"target {target}: {found.get('device')}; ms is onnxruntime's on this processor."]


def _met_already(error: BaseException | None) -> bool:
    """Whether pruning was refused because the network meets its budget as it is."""
    return error is not None and (isinstance(error, NothingPruned) or _met_already(error.__context__))


def _section(model: str, weights: str | None, pretrained: bool) -> tuple[dict[str, Any], list[str]]:
    """The recipe's ``model`` section, and a note where nothing says that the weights are trained."""
    name = f"onnx:{model}" if model.lower().endswith(".onnx") and not model.startswith("onnx:") else model
    source = name.partition(":")[0] if ":" in name else "built-in"
    section: dict[str, Any] = {"name": name, **({"weights": weights} if weights else {})}
    if pretrained:
        if source not in ("timm", "torchvision"):
            raise UserError("pretrained: timm and torchvision have weights of their own to fetch; give weights: FILE.")
        section["pretrained"] = True
    fetched = weights or pretrained or (source == "transformers" and Path(name.partition(":")[2]).expanduser().is_dir())
    if source in ("built-in", "timm", "torchvision", "transformers") and not fetched:
        return section, [f"{model} has random weights: size and time are real, accuracy says nothing. Give --weights "
                         "FILE, or --pretrained for timm and torchvision."]  # fmt: skip
    return section, []


def _rows(pipeline: Pipeline, result: Result, agreement: bool) -> list[dict[str, Any]]:
    """Before and after: the task's metric on the test split, bytes, median milliseconds, layers on integers."""
    metric, share, value = "accuracy", True, 1.0  # the labels are its own
    if not agreement:
        bundle = pipeline.load_data()
        metric, share = bundle.task.selects, bundle.task.metric.share
        value = evaluate(pipeline.builder(bundle)().eval(), bundle.test, bundle.task)[metric]
    certificate = result.certificate or {}
    dense, kernels, last = certificate.get("float") or {}, certificate.get("kernels") or {}, result.ledger[-1]
    timed = dense.get("latency") or {}
    told = {} if metric == "accuracy" else {"metric": metric, "share": share}
    before = {"network": "float", metric: value, **told, "bytes": dense.get("bytes"), "ms": timed.get("median_ms"),
              "layers on integers": "0"}  # fmt: skip
    there = (certificate.get("target") or {}).get("run") or {}
    counted = there if "layers" in there else kernels
    integer = f"{counted.get('integer_layers')} of {counted.get('layers')}"
    if "target" in certificate and not onnx_export.PROFILES[certificate["file"]["profile"]]().fused:
        integer = "not run there"
    reached = last["accuracy"] if metric == "accuracy" else last["metrics"][metric]
    after = {"network": "compressed", metric: reached["test"], **told, "bytes": last["bytes"],
             "ms": last["latency_ms"], "layers on integers": integer}  # fmt: skip
    return [before, after]
