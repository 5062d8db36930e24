"""Runs a recipe's stages in order, owns the run folder, and resumes where an earlier run stopped."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatcompress import data as datasets
from flatcompress import models
from flatcompress.data import DataBundle
from flatcompress.data.tokens import vocabulary_size
from flatcompress.environment import settled
from flatcompress.errors import UserError
from flatcompress.plan import Plan
from flatcompress.randomness import spaced
from flatcompress.recipe import Recipe, identity, load_recipe, parse_recipe
from flatcompress.report import expected
from flatcompress.session import Session
from flatcompress.stages import STAGES, RunContext, StageKeys, run_stage, stage_of
from flatcompress.stages.budget import Planned
from flatcompress.stages.dry_run import dry_run
from flatcompress.stages.keys import TrainingKeys
from flatcompress.stages.measure import measure
from flatcompress.tasks import Task
from flatcompress.training.callback import Callback
from flatcompress.training.devices import seed_everything
from flatcompress.training.loop import make_accelerator


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
    expected: dict[str, tuple[float, float]] | None = None

    def summary(self) -> dict[str, Any]:
        """What there is to show of it, as plain data."""
        files = {"folder": self.folder, "onnx": self.onnx, "report": self.report}
        paths = {name: None if path is None else str(path) for name, path in files.items()}
        said = expected.sentences(self.expected, self.ledger)
        return {**paths, "ledger": self.ledger, "certificate": self.certificate, "expected": said}


class Pipeline:
    """A recipe, ready to run.

    ``Pipeline.from_yaml("recipe.yaml")`` takes everything from the file.
    ``Pipeline(model=..., data=..., stages=[...])`` takes a module that maps a batch to what the task wants and a
    `DataBundle` (or what `flatcompress.data.bundle` accepts); ``stages`` are what a recipe's ``stages`` would hold.
    ``task`` is what is learned: a name, a mapping with its keys, or a `Task` (default: the data's own, of arrays
    classification). ``callbacks`` take part in every training (docs/extending.md); ``options`` are the recipe's other
    keys.
    UserError when anything is wrong, before anything runs.
    """

    def __init__(
        self,
        model: nn.Module | str | Mapping[str, Any] = "resnet8",
        data: DataBundle | str | Mapping[str, Any] = "rotated-digits",
        stages: Sequence[Any] = (),
        callbacks: Sequence[Callback] = (),
        task: Task | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._callbacks = tuple(callbacks)
        self._task = task
        self._module = model if isinstance(model, nn.Module) else None
        self._bundle = None if isinstance(data, str) or _is_recipe_section(data) else _as_bundle(data, task)
        self.recipe: Recipe = self._recipe(model, data, stages, options)

    def _recipe(self, model: Any, data: Any, stages: Sequence[Any], options: dict[str, Any]) -> Recipe:
        """The arguments as a recipe; what was given as an object stands there under its kind."""
        raw: dict[str, Any] = {"name": "python", **options}
        raw["model"] = {"name": f"python:{type(model).__name__}"} if self._module is not None else _section(model)
        batching = {key: raw.pop(key) for key in ("batch_size", "balance_domains") if key in raw}
        raw["data"] = {"name": "python"} if self._bundle is not None else _section(data)
        raw["data"] |= {key: value for key, value in batching.items() if value is not None}
        if self._task is not None:
            own = isinstance(self._task, Task)
            raw["task"] = {"name": f"python:{self._task.name}"} if own else self._task  # type: ignore[union-attr]
        raw["stages"] = [_stage_entry(s) for s in stages]
        return parse_recipe(raw, "Pipeline")

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
        """A pipeline from a recipe file; ``overrides`` are ``key=value`` texts as of ``--set``."""
        return cls.from_recipe(load_recipe(path, list(overrides)))

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Pipeline:
        """A pipeline from a checked recipe."""
        raw = recipe.to_dict()
        return cls(raw.pop("model"), raw.pop("data"), raw.pop("stages"), task=raw.pop("task"), **raw)

    @property
    def folder(self) -> Path:
        """Where `run` writes when it is not told otherwise: output_dir/name."""
        return Path(self.recipe.output_dir) / self.recipe.name

    @property
    def task(self) -> Any:
        """What `tasks.build` makes the task of: as given, else as the recipe says; None: the data's own."""
        given = self.recipe.task if self._task is None else self._task
        if isinstance(given, Mapping) and str(given.get("name")).startswith("python:"):
            raise UserError(f"task {given['name']!r} stands for an object given in Python; name a task instead.")
        return given

    def load_data(self) -> DataBundle:
        """The data set of the recipe, or the one this pipeline was given."""
        if self._bundle is not None:
            return self._bundle
        section = self.recipe.data
        if section.name == "python":
            raise UserError("data.name 'python' stands for an object given in Python; name a data set instead.")
        try:
            return datasets.load(section.name, seed=self.recipe.seed, task=self.task, **section.options)
        except TypeError as error:
            raise UserError(f"data: {_no_function_name(error)} for data set {section.name!r}.") from None

    def builder(self, bundle: DataBundle) -> Callable[[], nn.Module]:
        """A function that makes a fresh float model, the same every time."""
        if self._module is not None:
            original = copy.deepcopy(self._module)
            return lambda: copy.deepcopy(original)
        section = self.recipe.model
        if section.name.startswith("python:"):
            raise UserError(f"model.name {section.name!r} stands for an object given in Python; name a model instead.")

        def build() -> nn.Module:
            return models.build(
                section.name,
                num_classes=max(1, len(bundle.classes)),
                input_shape=bundle.input_shape,
                seed=self.recipe.seed,
                weights=section.weights,
                config=section.config,
                checked=bundle.task.of_vectors,
                vocabulary=vocabulary_size(bundle.features),
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

        A run that was interrupted resumes where it stopped; ``restart`` starts over. ``display`` receives every
        event of the log as a dict. UserError for wrong input, before anything is written; RunError for a run that
        failed (the message says what is kept); Interrupted after a signal.
        """
        recipe = self.recipe
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        path = Path(folder) if folder is not None else self.folder
        session = Session(path, recipe, restart, display)
        what = "reading the data, trying every stage on a copy"
        session.show("doing", what=what, measuring=False)
        with session.timed(what), settled():
            run = self.prepare()
        session.show("doing", what=None, measuring=False)
        with session, settled():
            run.folder, run.emit, run.show = session.folder.path, session.emit, session.show
            first = session.restore(run)
            session.begin(run, first)
            for index in range(first, len(recipe.stages)):
                self._stage(run, session, index)
            session.finish(run)
            report = session.report() if run.accelerator.is_main_process else None
        return Result(
            folder=path,
            ledger=run.ledger,
            onnx=run.artifacts.get("onnx"),
            certificate=run.certificate,
            report=report,
            model=run.model,
            plan=run.plan,
            expected=recipe.expected,
        )

    def prepare(self, *, tried: bool = True) -> RunContext:
        """Load the data, build the model and do every stage's surgery on a copy; nothing is written.

        ``tried=False`` leaves that dry run out. UserError for whatever is wrong with the input: what this returns can
        be run.
        """
        bundle = self.load_data()
        run = self._context(bundle)
        if tried:
            dry_run(run, [(entry.kind, entry.config) for entry in self.recipe.stages])
        return run

    def _context(self, bundle: DataBundle) -> RunContext:
        recipe = self.recipe
        accelerator = make_accelerator(recipe.device, recipe.precision)
        seed_everything(recipe.seed)
        build = self.builder(bundle)
        return RunContext(
            model=build().to(accelerator.device),
            plan=Plan(),
            data=bundle,
            build=build,
            accelerator=accelerator,
            seed=recipe.seed,
            batch_size=recipe.data.batch_size,
            workers=recipe.data.workers,
            balanced=self._balanced(bundle),
            memory_format=recipe.memory_format,
            measuring=recipe.measure,
            strategy=recipe.strategy,
            compiles=recipe.compile,
            planned=_planned(recipe, len(bundle.train)),
            recipe_hash=identity.digest(recipe),
            callbacks=self._callbacks,
        )

    def _balanced(self, bundle: DataBundle) -> bool:
        if self.recipe.data.balance_domains and len(bundle.train.domain_ids.unique()) < 2:
            raise UserError("data.balance_domains: the training part has one domain alone. Leave it out.")
        return self.recipe.data.balance_domains

    def _stage(self, run: RunContext, session: Session, index: int) -> None:
        entry = self.recipe.stages[index]
        run.seed = spaced(self.recipe.seed, index)
        seed_everything(run.seed)
        session.enter(run, index)
        started = time.monotonic()
        passes, run.spent, run.parts = run.passes, {}, {}
        run_stage(entry.kind, run, entry.config)
        seconds = session.elapsed + time.monotonic() - started
        own = seconds
        if stage_of(entry.kind).measured:
            flatness = entry.config.measures_sharpness
            run.ledger.append(measure(run, entry.kind, entry.config.label, seconds, run.passes - passes, flatness))
        else:
            run.ledger[-1]["seconds"] = seconds
            own -= sum(run.spent.values())  # what such a stage measures is within it
        session.spent(run, own)
        session.leave(run, index)


def _planned(recipe: Recipe, train: int) -> Planned:
    """What the stages train on ``train`` samples, and the rows of the ledger."""
    configs = [entry.config for entry in recipe.stages]
    samples = 0
    for config in configs:
        if isinstance(config, TrainingKeys):
            longest = sys.maxsize if config.max_steps is None else config.max_steps * recipe.data.batch_size
            samples += min(config.epochs * train, longest)
    return Planned(samples, len(configs))


def _is_recipe_section(data: Any) -> bool:
    return isinstance(data, Mapping) and isinstance(data.get("name"), str)


def _section(value: Any) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(value)


def _as_bundle(data: Any, task: Any) -> DataBundle:
    return datasets.bundle(data, task)


def _stage_entry(stage: Any) -> Any:
    """A stage given as a config object is its kind with its keys."""
    if isinstance(stage, StageKeys):
        return {kind: stage for kind in STAGES if type(stage) is stage_of(kind).config}
    return stage


def _no_function_name(error: TypeError) -> str:
    text = str(error)
    return text.split("() ", 1)[-1]
