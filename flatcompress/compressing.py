"""`compress`: a trained network and some inputs in; a smaller verified file, and the recipe that repeats it, out.

What is not said is decided here, and said in ``notes``: labels where there are none, inputs where there are none. The
work itself is a recipe's: this page writes one and runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatcompress import models
from flatcompress.data import arrays
from flatcompress.errors import UserError, unknown
from flatcompress.modules import evaluating
from flatcompress.pipeline import Pipeline, Result
from flatcompress.storage import write_bytes_atomic
from flatcompress.training.batches import evaluate

BITS = {"8": (8, 8), "w8a8": (8, 8), "6": (6, 8), "w6a8": (6, 8), "w4a8": (4, 8), "4": (4, 4), "w4a4": (4, 4)}
DRAWN = 256
_UNITS = {"B": 1, "kB": 1_000, "MB": 1_000_000}
_DEFAULT_SHAPE = (3, 224, 224)
_GAVE = re.compile(r"gave \(1, (\d+)\)")


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
    classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    display: Callable[[dict[str, Any]], None] | None = None,
) -> Compressed:
    """Quantize ``model`` without training (``epochs`` 0) or with it, and write a verified file.

    model: as in a recipe (built-in, ``timm:NAME``, ``torchvision:NAME``, ``transformers:TYPE``, ``onnx:FILE``,
    ``package.module:factory``), or an ``.onnx`` file. data: a folder of class folders, an ``.npz`` with labels, an
    ``.npz`` or ``.npy`` without, or nothing. Without labels the float network's own classes take their place, so that
    accuracy reads as agreement with it. bits: a key of `BITS`, or ``auto`` (with ``budget``, like 500kB, or 4 bits a
    weight on average). keep: share of the channels, with ``epochs``. max_drop: points of validation accuracy, without.
    UserError before anything runs; a certificate that does not hold is in the result.
    """
    notes: list[str] = []
    name = f"onnx:{model}" if model.endswith(".onnx") and not model.startswith("onnx:") else model
    folder = Path(out) if out is not None else Path("runs") / (re.sub(r"\W+", "-", Path(model).stem).strip("-") or "x")
    stages = _stages(bits, keep, max_drop, epochs, budget)
    section: dict[str, Any] = {"name": name, **({"weights": weights} if weights else {})}
    where = Path(data).expanduser() if data is not None else None
    if where is not None and where.is_dir():
        side = {} if input_shape is None else {"size": input_shape[1], "channels": input_shape[0]}
        source: dict[str, Any] = {"name": "folder", "path": str(where), **side}
    else:
        source = _arrays(section, where, folder, classes, input_shape, seed, notes)
    pipeline = Pipeline(section, {**source, "batch_size": 32}, stages, name=folder.name, output_dir=str(folder.parent),
                        seed=seed)  # fmt: skip
    result = pipeline.run(folder, restart=True, display=display)
    assert result.onnx is not None and result.certificate is not None
    return Compressed(folder, result.onnx, folder / "recipe.yaml", result.report, result.certificate,
                      _rows(pipeline, result), notes)  # fmt: skip


def _stages(bits: str, keep: float | None, max_drop: float | None, epochs: int, budget: str | None) -> list[Any]:
    """The stages that the options stand for. UserError for options that do not go together."""
    if bits.lower() not in (*BITS, "auto"):
        raise unknown("bits", bits, [*BITS, "auto"])
    if keep is not None and not (0 < keep < 1 and epochs):
        raise UserError("keep is a share of the channels between 0 and 1, and cutting needs training: give epochs too.")
    if budget is not None and bits.lower() != "auto":
        raise UserError("a budget of bytes goes with bits auto.")
    quantize: dict[str, Any] = {"epochs": epochs, **({"method": "lsq_sam"} if epochs else {})}
    if bits.lower() == "auto":
        quantize |= {"bits": "auto", "activation_bits": 8}
        quantize |= {"bytes": _bytes(budget)} if budget is not None else {"effective_bits": 4.0}
    else:
        weight, activation = BITS[bits.lower()]
        quantize |= {"weight_bits": weight, "activation_bits": activation}
        if weight <= 4 and not epochs:
            quantize |= {"rounding": "gptq", "correction": "batchnorm"}
    if max_drop is not None:
        quantize["max_drop"] = max_drop
    cut = [] if keep is None else [{"prune": {"ratio": round(1 - keep, 6), "epochs": epochs}}]
    return [*cut, {"quantize": quantize}, {"export": {"profile": "packed"}}]


def _bytes(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)\s*(B|kB|MB)", text)
    if found is None:
        raise UserError(f"budget {text!r}: a size in B, kB or MB, for example 500kB.")
    return float(found[1]) * _UNITS[found[2]]


def _arrays(
    section: dict[str, Any],
    path: Path | None,
    folder: Path,
    classes: int | None,
    input_shape: tuple[int, int, int] | None,
    seed: int,
    notes: list[str],
) -> dict[str, Any]:
    """A data section over an ``.npz`` file: the user's own, or one written into the run folder with what it lacked."""
    labels: Tensor | None = None
    if path is None:
        shape = input_shape or _DEFAULT_SHAPE
        x = torch.randn(DRAWN, *shape, generator=torch.Generator().manual_seed(seed))
        notes.append(f"no data: {DRAWN} inputs of shape {shape} are drawn from a normal distribution.")
    else:
        found = arrays.read(path)
        if "x_train" in found or arrays.labels_of(found, path) is not None:
            return {"name": "arrays", "path": str(path)}
        x = arrays.as_inputs(arrays.first(found, arrays.INPUTS, "inputs", path), path)
    network, count = _network(section, classes, tuple(x.shape[1:]), seed)
    with evaluating(network), torch.no_grad():
        labels = torch.cat([network(batch).argmax(1) for batch in x.split(64)])
    notes.append("no labels: the float network's own classes stand for them; accuracy is agreement with it.")
    target = folder.with_name(f"{folder.name}-inputs.npz")
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, x, labels, count)
    return {"name": "arrays", "path": str(target)}


def _network(section: dict[str, Any], classes: int | None, shape: Any, seed: int) -> tuple[nn.Module, int]:
    """The float network and how many classes it has: as asked, or as it says by itself."""
    given = {"input_shape": shape, "seed": seed, "weights": section.get("weights")}
    try:
        return models.build(section["name"], num_classes=classes or 1000, **given), classes or 1000
    except UserError as error:
        own = _GAVE.search(str(error))
        if classes is not None or own is None:
            raise
    return models.build(section["name"], num_classes=int(own[1]), **given), int(own[1])


def _write(path: Path, x: Tensor, y: Tensor, classes: int) -> None:
    import io

    made = io.BytesIO()
    np.savez(made, x=x.numpy(), y=y.numpy(), classes=np.array([str(c) for c in range(classes)]))
    write_bytes_atomic(path, made.getvalue())


def _rows(pipeline: Pipeline, result: Result) -> list[dict[str, Any]]:
    """Before and after: accuracy on the test split, bytes of the file, median milliseconds, layers on integers."""
    bundle = pipeline.load_data()
    accuracy = evaluate(pipeline.builder(bundle)().eval(), bundle.test, bundle.task)["accuracy"]
    certificate = result.certificate or {}
    dense, kernels, last = certificate.get("float") or {}, certificate.get("kernels") or {}, result.ledger[-1]
    timed = dense.get("latency") or {}
    before = {"network": "float", "accuracy": accuracy, "bytes": dense.get("bytes"), "ms": timed.get("median_ms"),
              "layers on integers": "0"}  # fmt: skip
    integer = f"{kernels.get('integer_layers')} of {kernels.get('layers')}"
    after = {"network": "compressed", "accuracy": last["accuracy"]["test"], "bytes": last["bytes"],
             "ms": last["latency_ms"], "layers on integers": integer}  # fmt: skip
    return [before, after]
