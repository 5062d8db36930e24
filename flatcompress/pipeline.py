"""Runs a recipe's stages in order, owns the run folder, and goes on where an earlier run stopped."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatcompress.data import DataBundle
from flatcompress.errors import RunError, UserError
from flatcompress.plan import Plan, apply_plan, load_weights
from flatcompress.randomness import spaced
from flatcompress.recipe import Recipe, load_recipe, parse_recipe
from flatcompress.stages.measure import measure
from flatcompress.stages.rehearse import rehearse
from flatcompress.stages.run import RUN
from flatcompress.stages.workpiece import Workpiece


@dataclass(frozen=True)
class Result:
    """What a finished run has produced."""

    folder: Path
    ledger: list[dict[str, Any]]
    onnx: Path | None
    certificate: dict[str, Any] | None
    report: Path | None
    model: nn.Module
    plan: Plan


class Pipeline:
    """A recipe, ready to run.

    ``Pipeline.from_yaml("recipe.yaml")`` takes everything from the file.
    ``Pipeline(model=..., data=..., stages=[...])`` takes a module that maps [B, C, H, W] to logits and a
    `DataBundle` (or what `flatcompress.data.bundle` accepts); ``stages`` are what a recipe's ``stages`` would hold.
    UserError when anything is wrong, before anything runs.
    """

    def __init__(
        self,
        model: nn.Module | str | Mapping[str, Any] = "resnet8",
        data: DataBundle | str | Mapping[str, Any] = "rotated-digits",
        stages: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        self._module = model if isinstance(model, nn.Module) else None
        self._bundle = None if isinstance(data, str) or _is_recipe_section(data) else _as_bundle(data)
        raw: dict[str, Any] = {"name": "python", **options}
        raw["model"] = {"name": f"python:{type(model).__name__}"} if self._module is not None else _section(model)
        batch_size = raw.pop("batch_size", None)
        raw["data"] = {"name": "python"} if self._bundle is not None else _section(data)
        if batch_size is not None:
            raw["data"]["batch_size"] = batch_size
        raw["stages"] = [_stage_entry(s) for s in stages]
        self.recipe: Recipe = parse_recipe(raw, "Pipeline")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
        """A pipeline from a recipe file; ``overrides`` are ``key=value`` texts as of ``--set``."""
        return cls.from_recipe(load_recipe(path, list(overrides)))

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Pipeline:
        """A pipeline from a checked recipe."""
        self = cls.__new__(cls)
        self._module, self._bundle, self.recipe = None, None, recipe
        return self

    @property
    def folder(self) -> Path:
        """Where `run` writes when it is not told otherwise: output_dir/name."""
        return Path(self.recipe.output_dir) / self.recipe.name

    def load_data(self) -> DataBundle:
        """The data set of the recipe, or the one this pipeline was given."""
        from flatcompress import data

        if self._bundle is not None:
            return self._bundle
        section = self.recipe.data
        if section.name == "python":
            raise UserError("data.name 'python' stands for an object given in Python; name a data set instead.")
        try:
            return data.load(section.name, seed=self.recipe.seed, **section.options)
        except TypeError as error:
            raise UserError(f"data: {_no_function_name(error)} for data set {section.name!r}.") from None

    def builder(self, bundle: DataBundle) -> Callable[[], nn.Module]:
        """A function that makes a fresh float model, the same every time."""
        from flatcompress import models

        if self._module is not None:
            original = copy.deepcopy(self._module)
            return lambda: copy.deepcopy(original)
        section = self.recipe.model
        if section.name.startswith("python:"):
            raise UserError(f"model.name {section.name!r} stands for an object given in Python; name a model instead.")

        def build() -> nn.Module:
            return models.build(
                section.name,
                num_classes=len(bundle.classes),
                input_shape=bundle.input_shape,
                seed=self.recipe.seed,
                weights=section.weights,
                config=section.config,
                **section.options,
            )

        return build

    def run(
        self,
        folder: str | Path | None = None,
        *,
        restart: bool = False,
        display: Callable[[dict[str, Any]], None] | None = None,
    ) -> Result:
        """Run every stage that is not finished yet and return the `Result`.

        A run that was interrupted goes on where it stopped; ``restart`` begins afresh. ``display`` receives every
        event of the log as a dict. UserError for wrong input, before anything is written; RunError for a run that
        failed (the message says what is kept); Interrupted after a signal.
        """
        from flatcompress.session import Session

        recipe = self.recipe
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        work = self.prepare()
        path = Path(folder) if folder is not None else self.folder
        with Session(path, recipe, restart, display) as session:
            work.folder, work.emit = session.folder.path, session.emit
            first = session.restore(work)
            session.begin(work, first)
            for index in range(first, len(recipe.stages)):
                self._stage(work, session, index)
            session.finish(work)
            report = session.report() if work.accelerator.is_main_process else None
        return Result(
            folder=path,
            ledger=work.ledger,
            onnx=work.artifacts.get("onnx"),
            certificate=work.certificate,
            report=report,
            model=work.model,
            plan=work.plan,
        )

    def prepare(self, *, rehearsed: bool = True) -> Workpiece:
        """Load the data, build the model and rehearse every stage's surgery on a copy; nothing is written.

        UserError for whatever is wrong with the input: what this returns can be run.
        """
        bundle = self.load_data()
        work = self._workpiece(bundle)
        if rehearsed:
            rehearse(work, self.recipe.stages)
        return work

    def _workpiece(self, bundle: DataBundle) -> Workpiece:
        from flatcompress.training.devices import seed_everything
        from flatcompress.training.loop import make_accelerator

        recipe = self.recipe
        accelerator = make_accelerator(recipe.device, recipe.precision)
        seed_everything(recipe.seed)
        build = self.builder(bundle)
        return Workpiece(
            model=build().to(accelerator.device),
            plan=Plan(),
            data=bundle,
            build=build,
            accelerator=accelerator,
            seed=recipe.seed,
            batch_size=recipe.data.batch_size,
            workers=recipe.data.workers,
            recipe_hash=recipe_hash(recipe),
        )

    def _stage(self, work: Workpiece, session: Any, index: int) -> None:
        from flatcompress.training.devices import seed_everything

        entry = self.recipe.stages[index]
        work.seed = spaced(self.recipe.seed, index)
        seed_everything(work.seed)
        session.enter(work, index)
        started = time.monotonic()
        passes = work.passes
        RUN[entry.kind](work, entry.config)
        seconds = session.elapsed + time.monotonic() - started
        if entry.kind != "export":
            work.ledger.append(
                measure(work, entry.kind, getattr(entry.config, "method", ""), seconds, work.passes - passes)
            )
        else:
            work.ledger[-1]["seconds"] = seconds
        session.leave(work, index)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of everything in the recipe that can change the result."""
    raw = recipe.to_dict()
    for key in ("name", "output_dir", "checkpoint_every", "log"):
        raw.pop(key)
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def load_model(build: Callable[[], nn.Module], plan: Plan, state: dict[str, torch.Tensor], example: Any) -> nn.Module:
    """A fresh model taken through ``plan``, with ``state`` loaded. RunError when they do not fit."""
    model = apply_plan(build(), plan, example)
    try:
        load_weights(model, state)
    except UserError as error:
        raise RunError(f"the checkpoint does not fit its plan: {error}") from None
    return model


def _is_recipe_section(data: Any) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("name"), str)


def _section(value: Any) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(value)


def _as_bundle(data: Any) -> DataBundle:
    from flatcompress.data import bundle

    return data if isinstance(data, DataBundle) else bundle(data)


def _stage_entry(stage: Any) -> Any:
    from flatcompress.stages.configs import STAGE_CONFIGS

    for kind, config in STAGE_CONFIGS.items():
        if isinstance(stage, config):
            return {kind: stage.model_dump()}
    return stage


def _no_function_name(error: TypeError) -> str:
    text = str(error)
    return text.split("() ", 1)[-1]
