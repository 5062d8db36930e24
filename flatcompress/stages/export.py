"""The export stage: write the ONNX file, prove it, measure it as its users will."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from flatcompress import onnx_export, quant
from flatcompress.errors import UserError, unknown
from flatcompress.onnx_export import targets
from flatcompress.onnx_export.proof.roundoff import EVALUATIONS
from flatcompress.onnx_export.runtime import latency, sessions
from flatcompress.stages import budget, families, features_inside, predictions
from flatcompress.stages.context import RunContext
from flatcompress.stages.keys import KeyProblem, Share, StageKeys
from flatcompress.stages.measure import float_twin, measure, scores, some
from flatcompress.stages.predictions import Watched
from flatcompress.stages.reported import reported
from flatcompress.stages.stage import Earlier, Facts, Phase, Stage
from flatcompress.storage import write_json_atomic
from flatcompress.training import layout
from flatcompress.training.batches import in_order

BATCH, NUMBERS = 256, 1 << 20  # samples, and numbers of the input, at a time: large activations cost page faults
QUICK_SECONDS = 0.1  # of loading, and of timing, the files that latencies are of, unless `measure` is full


class ExportConfig(StageKeys):
    """Write the ONNX file and prove that it is the model that was trained."""

    @property
    def needs_whole(self) -> str | None:
        return None  # by then weights are whole again

    profile: str = Field("packed", description="file format; see `flatcompress list profiles`")
    target: str | None = Field(
        None, description="what the file is for: sets the profile, is checked; see `flatcompress list targets`"
    )
    opset: Annotated[int, Field(ge=13, le=28)] | None = Field(
        None, description="ONNX opset; default: lowest that works"
    )
    latency: bool = Field(True, description="measure latency beside the float model's")
    require_integer: bool = Field(False, description="a layer that computes in floats is a failure, not a warning")
    threads: Annotated[int, Field(ge=1, le=256)] = Field(1, description="onnxruntime threads for the latency")
    widths: Annotated[list[Share | Literal[1]], Field(min_length=1)] | None = Field(
        None,
        description="after elastic: shares of the channels to write beside the full network (default: all trained)",
    )
    mix: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] | None = Field(
        None, description="after elastic: one more network, with a share for each group of channels: {layer1: 0.5}"
    )
    features: Literal["outside", "inside"] = Field(
        "outside", description="of sound: inside writes a second file, which takes samples"
    )
    pack_activations: bool = Field(
        False, description="of profile c: activations of up to 4 bits lie two to a byte in RAM, for more instructions"
    )

    @property
    def label(self) -> str:
        return self.target or self.profile

    @model_validator(mode="after")
    def _opset_for_features(self) -> ExportConfig:
        if self.features == "inside" and self.opset is not None and self.opset < features_inside.OPSET:
            raise KeyProblem(
                "opset", f"features: inside needs ONNX opset {features_inside.OPSET} (STFT) or a later one."
            )
        return self

    @model_validator(mode="after")
    def _known_target(self) -> ExportConfig:
        """A target brings its profile; the recipe of a run folder has both written out."""
        if self.target is None:
            return self
        if self.target not in onnx_export.TARGETS:
            raise KeyProblem("target", str(unknown("target", self.target, onnx_export.TARGETS)))
        target = onnx_export.TARGETS[self.target]()
        if target.instead:
            raise KeyProblem("target", target.instead)
        if "profile" in self.model_fields_set and self.profile != target.profile:
            raise KeyProblem("profile", f"target {self.target!r} reads profile {target.profile!r}: leave it out.")
        self.profile = target.profile
        return self

    @model_validator(mode="after")
    def _known_profile(self) -> ExportConfig:
        if self.profile.lower() == "tflite":
            raise KeyProblem(
                "profile", "TFLite is called LiteRT now: write profile: litert; for microcontrollers take profile: c."
            )
        if self.profile not in onnx_export.PROFILES:
            raise KeyProblem("profile", str(unknown("profile", self.profile, onnx_export.PROFILES)))
        if self.pack_activations and not onnx_export.PROFILES[self.profile]().c:
            raise KeyProblem(
                "pack_activations", f"profile {self.profile!r} writes no C, whose RAM it is about: take profile: c."
            )
        return self


def phases(run: RunContext, config: ExportConfig) -> list[Phase]:
    """One: write the file and prove it."""
    return [Phase("export", partial(_export, run, config))]


def _export(run: RunContext, config: ExportConfig, facts: Facts) -> None:
    """Write the ONNX file and its certificate into the run folder; the ledger gains the exported file's row.

    The first export of a run is ``model.onnx``; a further one goes to a folder of its target's or profile's name. The
    narrower networks of a family go to folders of their widths' names.
    """
    assert run.folder is not None
    first = "onnx" not in run.artifacts
    folder = run.folder if first else run.folder / config.label
    ledger, certificates = list(run.ledger), []
    for name, part in families.exported(run, config.widths, config.mix):
        with ExitStack() as stack:
            # every process takes part in the measuring, one of them writes into the run folder
            main = run.accelerator.is_main_process
            target = folder / name if main else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            target.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sessions.shared())
            if part is not run:
                part.ledger = [*ledger, _row_of(part, ledger)] if name else ledger
            row, certificate = write(part, config, target / "model.onnx")
        run.ledger.append({**row, "method": f"{row['method']}, {name}"} if name else row)
        certificates.append(certificate)
    if first:
        run.artifacts["onnx"] = folder / "model.onnx"
        run.certificate = next((c for c in certificates if not c["holds"]), certificates[-1])


def _row_of(part: RunContext, ledger: list[dict[str, Any]]) -> dict[str, Any]:
    """What `measure` says of one network of a family, as a row of the last stage; nothing of it is logged."""
    stage, method = ledger[-1]["stage"], ledger[-1]["method"]
    part.emit, part.show = (lambda event, **fields: None), (lambda event, **fields: None)
    return measure(part, stage, method, 0.0, 0, flatness=False)


def dry_run(model: nn.Module, example: Tensor, config: ExportConfig) -> None:
    """Write and load the untrained copy ``model``: every reason to refuse it is known before anything is trained."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if quant.is_quantized(model):
            quant.calibrate(model, [example])
        path = Path(folder) / "model.onnx"
        try:
            onnx_export.export(
                model, example, path, config.profile, opset=config.opset, pack_activations=config.pack_activations
            )
            sessions.session(path)
        except (UserError, OSError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise UserError(f"the file of {type(model).__name__} cannot be written ({reason}).") from error


def write(run: RunContext, config: ExportConfig, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write ``path`` and ``certificate.json`` beside it; returns the ledger row and the certificate."""
    model = run.model.cpu().eval()
    example = run.example().cpu()
    before = run.ledger[-1] if run.ledger else {}
    with run.timed("writing the file"):
        exported = onnx_export.export(
            model,
            example,
            path,
            profile=config.profile,
            opset=config.opset or (features_inside.OPSET if config.features == "inside" else None),
            metadata=metadata(run, before),
            class_names=list(run.data.classes) or None,
            pack_activations=config.pack_activations,
        )
    batches = proved_on(run)
    with run.timed("proof"), layout.lying(model, run.layout), quant.held(model):
        certificate = onnx_export.certify(
            exported,
            [x for x, _ in batches],
            [y for _, y in batches],
            model=model,
            task=run.task,
            latency_runs=0,
            require_integer=config.require_integer,
            integer_time=config.latency,
            evaluations=budget.evaluations(run.measuring, run.planned, EVALUATIONS),
        )
    if config.target is not None:
        with run.timed("target"):
            images = [x for x, _ in batches]
            targets.judge(certificate, exported, images, config.target, run.task.agreement)
    if config.features == "inside":
        with run.timed("features inside the file"):
            _features_inside(run, certificate, path)
    for message in certificate["warnings"]:
        warnings.warn(message, stacklevel=2)
    nothing: dict[str, Any] = {"float": {"bytes": None, "smaller": None, "faster": None}, "latency": None}
    with run.timed("float file and latencies"):
        certificate |= reported(
            "the file could not be compared with the float model's", lambda: beside_float(run, config, path), nothing
        )
    certificate["recipe_sha256"] = run.recipe_hash
    certificate["test_samples"] = {"proved_on": sum(len(y) for _, y in batches), "of": len(run.data.test)}
    write_json_atomic(path.with_name("certificate.json"), certificate)
    run.emit("layers", layers=layer_rows(certificate, before))
    return ledger_row(run, config, path, before, certificate), certificate


def proved_on(run: RunContext) -> list[tuple[Tensor, Tensor]]:
    """The batches of the test part that the proof is on; an event says where they are not all of it."""
    shape, whole = run.data.input_shape, len(run.data.test)
    count = budget.proof(run.measuring, run.planned, whole, 4 * math.prod(shape))
    if count < whole:
        run.emit("sampled", what="proof", samples=count, of_samples=whole)
    return list(in_order(some(run.data.test, count), together(shape)))


def _features_inside(run: RunContext, certificate: dict[str, Any], path: Path) -> None:
    """The second file, which takes sound: its part of the certificate, and why that one does not hold for it."""
    (mean,), (std,) = run.data.mean, run.data.std
    target = path.with_name(features_inside.NAME)
    certificate["features"] = features_inside.write(path, target, dict(run.data.features), mean, std)
    certificate["failures"] += features_inside.failures(certificate["features"])
    certificate["holds"] = not certificate["failures"]


def metadata(run: RunContext, before: dict[str, Any]) -> dict[str, str]:
    """What makes the file usable alone: preprocessing, data, accuracy, and the recipe it came from."""
    data = run.data
    layouts = {3: "NCHW", 2: "NCT", 1: "NF"}
    size: dict[str, Any] = {
        "layout": layouts.get(len(data.input_shape), "N..."),
        "size": list(data.input_shape),
        "range": [0, 1],
        "mean": data.mean,
        "std": data.std,
    }
    if data.intensity is not None:  # of images with more than eight bits: what becomes 0 and 1
        size["intensity"] = list(data.intensity)
    if data.features:
        size["features"] = dict(data.features)
    task = run.task
    values = before.get("accuracy", {}) if task.plain else before.get("metrics", {}).get(task.selects, {})
    reached = {k: round(v, 4) for k, v in values.items() if v is not None}
    told = {"accuracy": reached} if task.plain else {"task": task.described(), "metric": {task.selects: reached}}
    entries = {"preprocessing": size, **told, "data": data.name, "recipe_sha256": run.recipe_hash}
    return {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in entries.items()}


def beside_float(run: RunContext, config: ExportConfig, path: Path) -> dict[str, Any]:
    """The float model's own ONNX file, in the same run: its bytes, and the latencies measured in turn.

    Where channels were cut, the float model of the same channels is a third: what pruning alone gives.
    """
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "float32.onnx"
        onnx_export.export(run.build().cpu().eval(), run.example().cpu(), dense, profile="float32")
        if len(run.ledger) == 1 and run.ledger[0].get("stage") == "quantize":  # no float stage was measured
            _float_predictions(run, dense)
        found: dict[str, Any] = {"float": {"bytes": dense.stat().st_size, "smaller": None, "faster": None}}
        found["float"]["smaller"] = found["float"]["bytes"] / path.stat().st_size
        if not config.latency:
            return {**found, "latency": None}
        candidates: dict[str, Path] = {"file": path, "float": dense}
        if any(step.kind != "quantizers" for step in run.plan.steps):
            candidates["pruned"] = Path(folder) / "pruned.onnx"
            onnx_export.export(float_twin(run).eval(), run.example().cpu(), candidates["pruned"], profile="float32")
            found["float"]["pruned"] = {"bytes": candidates["pruned"].stat().st_size}
        most = None if run.measuring == "full" else QUICK_SECONDS
        timed = latency.measure(candidates, threads=config.threads, runs=30, seconds=most)
    found["float"]["latency"] = timed["float"]
    if "pruned" in timed:
        found["float"]["pruned"]["latency"] = timed["pruned"]
    found["float"]["faster"] = timed["float"]["median_ms"] / timed["file"]["median_ms"]
    figures = {str(config.threads): timed["file"]}
    runs = int(timed["file"].pop("runs", 30))
    return {**found, "latency": {"method": latency.METHOD, "runs": runs, "batch": 1, "threads": figures}}


def _float_predictions(run: RunContext, dense: Path) -> None:
    """Log what the float model that the recipe starts from says of the test part; onnxruntime is the faster one."""
    watched = Watched(run.task)
    with run.timed("the float model's predictions"):
        scored = reported(
            "the float model's predictions could not be taken",
            lambda: session_score(dense)(run.data.test, watched),
            None,
        )
        if scored is not None:
            predictions.emit(run, {"test": watched}, of="float")


def session_score(path: Path, fused: bool = True) -> Callable[[Any, Watched], dict[str, float]]:
    """A function that gives a task's metrics of the exported file on a dataset, through onnxruntime."""
    session = sessions.session(path, fused=fused)

    def outputs(x: Tensor) -> Tensor:
        return torch.from_numpy(sessions.run(session, [x.numpy()]))

    def score(dataset: Any, watched: Watched) -> dict[str, float]:
        size = together(tuple(session.get_inputs()[0].shape[1:]))
        return watched.measure((outputs(x), y) for x, y in in_order(dataset, size))

    return score


def together(shape: Sequence[Any]) -> int:
    """How many samples of ``shape`` a batch of the proof has.

    >>> together((3, 32, 32)), together((3, 224, 224))
    (256, 6)
    """
    numbers = math.prod(side for side in shape if isinstance(side, int))
    return max(1, min(BATCH, NUMBERS // max(1, numbers)))


def ledger_row(
    run: RunContext, config: ExportConfig, path: Path, before: dict[str, Any], certificate: dict[str, Any]
) -> dict[str, Any]:
    """The exported file's row: everything through onnxruntime; what only torch can measure is the model's before."""
    timing = certificate["latency"]
    return {
        "stage": "export",
        "method": config.profile,
        **scores(run, session_score(path, onnx_export.PROFILES[config.profile]().fused)),
        "sharpness": None,
        "params": before.get("params"),
        "nonzero": before.get("nonzero"),
        "macs": before.get("macs"),
        "bytes": path.stat().st_size,
        "seconds": None,
        "passes": 0,
        "latency_ms": timing["threads"][str(config.threads)]["median_ms"] if timing else None,
    }


def layer_rows(certificate: dict[str, Any], before: dict[str, Any]) -> list[dict[str, Any]]:
    """The certificate's layers as the report reads them."""
    keys = ("name", "kind", "weight_bits", "activation_bits", "bytes", "sparsity", "kernel", "encoding")
    return [{k: row.get(k) for k in keys} | {"channels": row["shape"][0]} for row in certificate["layers"]]


def profile_problem(profile: str, quantized: bool) -> str | None:
    """Why ``profile`` cannot hold a model that is (not) quantized, or None."""
    integer = onnx_export.PROFILES[profile]().integer
    if integer and not quantized:
        return f"profile '{profile}' stores quantized weights: put 'quantize' before it, or use profile: float32."
    if not integer and quantized:
        return f"profile '{profile}' is for float models, and an earlier stage quantizes. Use profile: packed."
    return None


def fits(config: ExportConfig, earlier: Earlier) -> str | None:
    """The profile must be for what the model is by then, and not be written yet."""
    problem = profile_problem(config.profile, any(kind == "quantize" for kind, _ in earlier))
    given = [key for key in ("widths", "mix") if getattr(config, key) is not None]
    if given and not any(kind == "elastic" for kind, _ in earlier):
        return f"{given[0]}: nothing before it trains widths. Put 'elastic' before it, or leave the key out."
    if problem is None and config.label in [before.label for kind, before in earlier if kind == "export"]:
        what = "profile" if config.target is None else "target"
        return f"{what} '{config.label}' is already written by an earlier export."
    return problem or _scheme_problem(config, earlier)


def _scheme_problem(config: ExportConfig, earlier: Earlier) -> str | None:
    """What the target needs of the quantize stage before it, where that has it otherwise."""
    wanted = onnx_export.TARGETS[config.target]().quantize if config.target is not None else {}
    for before in (found for kind, found in earlier if kind == "quantize"):
        for key, value in wanted.items():
            if getattr(before, key) != value:
                return f"target '{config.target}' needs quantize: {{{key}: {json.dumps(value)}}}."
    return None


STAGE = Stage(
    ExportConfig,
    phases,
    dry_run,
    needs_weights="has nothing trained to export. Put stages before it or give model.weights.",
    ends="the file is already written. Put 'export' last.",
    fits=fits,
    measured=False,
)
