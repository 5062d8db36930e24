"""What the commands do, as functions that return plain data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flatcompress import data, extensions, flat, models, onnx_export, prune, quant, report
from flatcompress.cli import fitting
from flatcompress.cli.templates import STARTERS
from flatcompress.data.corruptions import CORRUPTIONS
from flatcompress.errors import UserError, unknown
from flatcompress.pipeline import Pipeline, Result
from flatcompress.quant import ptq
from flatcompress.recipe import Recipe, load_recipe, parse_recipe
from flatcompress.registry import Registry, shown
from flatcompress.search.driver import run_search
from flatcompress.search.spec import load_search, parse_search
from flatcompress.session import restore
from flatcompress.stages import STAGES, RunContext, members
from flatcompress.stages import export as export_stage
from flatcompress.stages.emphasis import EMPHASES
from flatcompress.stages.measure import sharpness_report
from flatcompress.stages.prune_methods import PRUNE_METHODS
from flatcompress.stages.qat_methods import QAT_METHODS
from flatcompress.storage import write_text_atomic
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep import on_ray, pool, table
from flatcompress.sweep.executor import Executor
from flatcompress.sweep.spec import load_sweep
from flatcompress.tasks import TASKS
from flatcompress.yaml_source import parse_yaml

CATALOGUE: dict[str, Registry] = {
    "methods": flat.METHODS,
    "combinations": flat.COMBINATIONS,
    "emphases": EMPHASES,
    "federations": flat.federated.FEDERATIONS,
    "domain-methods": flat.inconsistency.DOMAIN_METHODS,
    "measures": flat.MEASURES,
    "prune-methods": PRUNE_METHODS,
    "qat-methods": QAT_METHODS,
    "importances": prune.IMPORTANCES,
    "reparametrizations": prune.REPARAMETRIZATIONS,
    "quantizers": quant.QUANTIZERS,
    "scalings": ptq.SCALINGS,
    "weight-scales": ptq.WEIGHT_SCALES,
    "calibrators": ptq.CALIBRATORS,
    "roundings": ptq.ROUNDINGS,
    "corrections": ptq.CORRECTIONS,
    "models": models.MODELS,
    "data": data.DATASETS,
    "corruptions": CORRUPTIONS,
    "profiles": onnx_export.PROFILES,
    "targets": onnx_export.TARGETS,
    "stages": STAGES,
    "tasks": TASKS,
}


def run_recipe(
    path: Path,
    settings: list[str],
    output: Path | None,
    restart: bool,
    display: Callable[[dict[str, Any]], None] | None,
) -> Result:
    """Run a recipe file. UserError, RunError or Interrupted say what went wrong and how to resume."""
    return Pipeline.from_recipe(load_recipe(path, settings)).run(output, restart=restart, display=display)


def run_sweep_file(
    path: Path, jobs: int | None, on: str = "local", storage_path: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Run a sweep file, ``on`` the local pool or a Ray cluster, and write its table; the Markdown and the data."""
    sweep = load_sweep(path)
    local, where = jobs or sweep.jobs, storage_path if on == "local" else storage_path or sweep.storage_path
    device = str(sweep.recipe.get("device", "auto")) if isinstance(sweep.recipe, dict) else "auto"

    def made() -> Executor:
        asked = local if on == "local" else jobs
        return on_ray.executor(on, sweep.folder, asked, where, sweep.resources, device, pool.stderr)

    return table.write(sweep, pool.run_sweep(sweep, pool.stderr, made))


def run_search_file(path: Path, given: dict[str, Any], on: str = "local") -> tuple[str, dict[str, Any]]:
    """Run a search file with some keys ``given`` instead, and write its front; the Markdown and the data."""
    found = load_search(path)
    found = parse_search({**found.model_dump(exclude_unset=True), **given}, str(path))
    device = str(found.recipe.get("device", "auto")) if isinstance(found.recipe, dict) else "auto"
    where = given.get("storage_path") if on == "local" else found.storage_path

    def made() -> Executor:
        asked = found.jobs if on == "local" else given.get("jobs")
        return on_ray.executor(on, found.folder, asked, where, found.resources, device, pool.stderr, ahead=0)

    return run_search(found, pool.stderr, made).write()


def plan_sweep(path: Path) -> list[str]:
    """Write the recipes of a sweep's runs and return the commands that run them."""
    return pool.plan(load_sweep(path))


def check_recipe(path: Path, settings: list[str], syntax_only: bool) -> dict[str, Any]:
    """Check a recipe file; without ``syntax_only`` also load its data and model and try the stages on a copy."""
    recipe = load_recipe(path, settings)
    kinds = [entry.kind for entry in recipe.stages]
    summary: dict[str, Any] = {"valid": True, "name": recipe.name, "stages": kinds, "text": " -> ".join(kinds)}
    if not syntax_only:
        run = Pipeline.from_recipe(recipe).prepare()
        bundle = run.data
        summary["samples"] = {"train": len(bundle.train), "val": len(bundle.val), "test": len(bundle.test)}
        summary["parameters"] = sum(p.numel() for p in run.model.parameters())
        summary["text"] += f"; {summary['samples']['train']} training samples, {summary['parameters']:,} parameters"
    return summary


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Every registry as rows of name, summary, paper, defaults and the package that the row comes from."""
    extensions.load()
    return {
        kind: [
            {"name": e.name, "summary": e.summary, "paper": e.paper, "defaults": _plain(e.defaults), "from": e.origin}
            for e in registry.values()
        ]
        for kind, registry in CATALOGUE.items()
    }


def _plain(defaults: dict[str, Any]) -> dict[str, Any]:
    return {key: shown(value) for key, value in defaults.items()}


def verify_target(target: Path, key: Path | None = None) -> dict[str, Any]:
    """Repeat the certificate of a run folder or of an ONNX file on this machine; with ``key`` its signature too."""
    _require_target(target)
    return onnx_export.verify(target, key).to_dict()


def _require_target(target: Path) -> None:
    if not target.exists():
        raise UserError(f"{target}: not found. Give a run folder or an ONNX file that has its certificate beside it.")


def sign_target(target: Path, key: Path, password: str | None) -> Path:
    """Sign what a certificate is about; the signature's path."""
    _require_target(target)
    return onnx_export.sign(target, key, password)


def write_sbom(folder: Path) -> Path:
    """Write the bill of materials of a run folder; its path."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a run folder.")
    return report.sbom.build(folder)


def bench_file(file: Path, threads: int, runs: int) -> dict[str, Any]:
    """Latency, load time and size of an ONNX file, here."""
    if not file.is_file():
        raise UserError(f"{file}: not a file. Give an ONNX file, for example runs/quickstart/model.onnx.")
    return onnx_export.bench(file, threads=[threads], runs=runs)


def rebuild_report(folder: Path) -> Path:
    """Write report.html and model-card.md again from what is in the run folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a run folder.")
    there = RunFolder(folder)
    if not any(path.exists() for path in (there.recipe, there.ledger, there.log)):
        raise UserError(f"{folder}: holds no recipe.yaml, ledger.json or log.jsonl, so it is no run folder.")
    report.card.build(folder)
    return report.build(folder)


def write_starter(path: Path, template: str | None, data_folder: Path | None, force: bool) -> str:
    """Write a commented starter recipe, ``template``'s or one fitted to the images of ``data_folder``; what was found.

    UserError when the file exists and ``force`` is not set.
    """
    if template is not None and data_folder is not None:
        raise UserError("--template and --data: give one. --data chooses the template by what is in the folder.")
    template = template or "quickstart"
    if template not in STARTERS:
        raise unknown("template", template, STARTERS)
    if path.exists() and not force:
        raise UserError(f"{path} exists. Use --force to overwrite it, or give another name.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder.")
    text, said = (STARTERS[template], "") if data_folder is None else fitting.fitted(data_folder)
    write_text_atomic(path, text)
    return said


def open_run(folder: Path) -> tuple[Recipe, Pipeline]:
    """The recipe and the pipeline of an existing run folder. UserError when there is none, or it was made in Python."""
    text = RunFolder(folder).read_recipe() if folder.is_dir() else None
    if text is None:
        raise UserError(f"{folder}: no recipe.yaml there, so it is no run folder.")
    recipe = parse_recipe(parse_yaml(text, str(folder / "recipe.yaml"))[0], str(folder / "recipe.yaml"))
    return recipe, Pipeline.from_recipe(recipe)


def load_run(folder: Path, stage: str | None = None) -> RunContext:
    """The run as a finished stage left it, from the run folder alone; of a family of widths the full network."""
    _, pipeline = open_run(folder)
    found = RunFolder(folder).load(stage)
    run = pipeline.prepare(tried=False)
    restore(run, found)
    run.folder = folder
    return members.full(run)


def export_checkpoint(
    folder: Path, profile: str | None, output: Path | None, opset: int | None, stage: str | None = None,
    target: str | None = None, pack_activations: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a finished checkpoint of ``folder`` (the newest, or ``stage``'s) as ONNX, with a certificate of its own."""
    given = {"profile": profile, "target": target, "opset": opset, "pack_activations": pack_activations}
    config = _export_config(given)
    profile = config.profile
    run = load_run(folder, stage)
    quantized = bool(run.plan.of_kind("quantizers"))
    if export_stage.profile_problem(profile, quantized) is not None:
        kind = "quantized" if quantized else "float"
        raise UserError(
            f"profile {profile!r} does not fit: the checkpoint is {kind}. Another stage's is named by --stage; there "
            f"are: {', '.join(RunFolder(folder).finished_stages())}."
        )
    path = output or folder / config.label / "model.onnx"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}).") from None
    _, certificate = export_stage.write(run, config, path)
    return {"onnx": str(path), **certificate}


def _export_config(given: dict[str, Any]) -> export_stage.ExportConfig:
    """The export stage's keys from options, those that are not None. UserError for what they cannot be."""
    try:
        return export_stage.ExportConfig(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise UserError("\n".join(found["msg"].removeprefix("Value error, ") for found in error.errors())) from None


def measure_sharpness(folder: Path, stage: str | None, samples: int) -> dict[str, Any]:
    """Sharpness measures of a finished checkpoint on its training split."""
    return sharpness_report(load_run(folder, stage), samples)
