"""Sweeps: methods x seeds x held-out domains over one recipe, as a list of ordinary runs.

A sweep file names a base recipe and, per method, which of its keys change. Every combination is a run of its own in a
folder of its own, exactly what ``flatcompress run`` would do with those overrides. Runs that begin with the very same
stages, seed and data share them: the common part is trained once and its checkpoint is handed on.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, ValidationError, model_validator

from flatcompress.errors import UserError
from flatcompress.recipe import Recipe, identity, parse_recipe
from flatcompress.recipe.schema import NAME
from flatcompress.stages.keys import Strict
from flatcompress.yaml_source import MAX_BYTES, override, parse_yaml


class MethodEntry(Strict):
    """One row of the table: the base recipe with some keys changed."""

    name: Annotated[str, Field(min_length=1, max_length=60)] = Field(description="name of the row")
    stages: list[Any] | None = Field(None, description="stages in place of the base recipe's")
    set: dict[str, Any] = Field(default_factory=dict, description="keys to override: {stages.1.quantize.method: lsq}")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="values to try per key; the best by validation on the source domains stays"
    )

    @model_validator(mode="after")
    def _values(self) -> MethodEntry:
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key} lists no value")
        return self

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid; one empty setting without a grid."""
        return [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]


class Resources(Strict):
    """What a run asks a Ray cluster for."""

    cpu: Annotated[float, Field(gt=0)] = Field(1.0, description="CPUs of a run")
    gpu: Annotated[float, Field(ge=0)] | None = Field(
        None, description="GPUs of a run (default: one where the recipe's device is cuda, or auto and there are GPUs)"
    )


class Sweep(Strict):
    """A sweep file."""

    name: Annotated[str, Field(pattern=NAME)] = Field("sweep", description="name of the sweep's folder")
    output_dir: str = Field("runs", description="where the sweep's folder goes")
    recipe: str | dict[str, Any] = Field(description="base recipe: a file, or its keys")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field([0, 1, 2], description="seeds")
    held_out: list[str] = Field(default_factory=list, description="domains to hold out in turn (none: as the recipe)")
    tune_seeds: list[int] = Field(default_factory=list, description="seeds to choose from a grid on (none: all)")
    tune_held_out: list[str] = Field(default_factory=list, description="domains held out while choosing (none: all)")
    jobs: Annotated[int, Field(ge=1, le=256)] = Field(1, description="runs at the same time in the local pool")
    storage_path: str | None = Field(None, description="on Ray: folder or fsspec URL that all machines reach")
    resources: Resources = Field(default_factory=lambda: Resources(), description="on Ray: {cpu, gpu} of a run")
    methods: Annotated[list[MethodEntry], Field(min_length=1)] = Field(description="rows of the table")

    @model_validator(mode="after")
    def _distinct(self) -> Sweep:
        for what, values in (("method", [m.name for m in self.methods]), ("seed", self.seeds)):
            twice = [v for v, n in Counter(values).items() if n > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is given twice")
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this sweep is."""
        return Path(self.output_dir) / self.name


class WithRecipe(Protocol):
    """What is said on top of a recipe, or of a recipe's file."""

    recipe: str | dict[str, Any]


Checked = TypeVar("Checked", bound=WithRecipe)


def load_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file. UserError for everything that is wrong with it."""
    return load_file(path, "sweep", parse_sweep)


def load_file(path: str | Path, kind: str, parse: Callable[[Any, str], Checked]) -> Checked:
    """Read a file of that ``kind`` (sweep, search), ``parse`` it, and read the recipe that it names.

    UserError for everything that is wrong with either.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: too large for a {kind} file; at most {MAX_BYTES} bytes are read.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}).") from None
    raw, _ = parse_yaml(text, str(path))
    found = parse(raw, str(path))
    if isinstance(found.recipe, str):
        found.recipe = base_recipe(path, found.recipe)
    return found


def parse_sweep(raw: Any, where: str = "sweep") -> Sweep:
    """Check plain data and return the `Sweep`. UserError lists every problem, one a line."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a sweep is a mapping of keys (recipe, methods, seeds ...).")
    try:
        return Sweep.model_validate(raw)
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(map(str, e['loc'])) or 'sweep'}: {e['msg']}." for e in error.errors()]
        if any(e["type"] == "extra_forbidden" for e in error.errors()):
            lines.append(f"{where}: allowed keys: {', '.join(Sweep.model_fields)}.")
        raise UserError("\n".join(lines)) from None


def base_recipe(sweep: Path, name: str) -> dict[str, Any]:
    """The recipe file that a sweep or search names, relative to it or to where we are."""
    for path in (sweep.parent / name, Path(name)):
        if path.is_file():
            raw, _ = parse_yaml(path.read_text(encoding="utf-8"), str(path))
            if not isinstance(raw, dict):
                raise UserError(f"{path}: not a recipe.")
            return raw
    raise UserError(f"{sweep}: recipe {name!r} is not there, neither beside the sweep nor here.")


@dataclass(frozen=True)
class Run:
    """One cell: a method under one setting of its grid, a held-out domain and a seed."""

    method: str
    setting: str
    held_out: str | None
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """What the run computes: equal keys, equal bits."""
        return key_of(self.recipe, len(self.recipe.stages))


def runs_of(
    sweep: Sweep, method: MethodEntry, setting: dict[str, Any], seeds: list[int], domains: list[str]
) -> list[Run]:
    """The runs of ``method`` under ``setting``. UserError names the method and what is wrong."""
    text = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in setting.items())
    every: list[str | None] = [*domains] or [None]
    return [
        Run(method.name, text, domain, seed, _recipe(sweep, method, setting, domain, seed))
        for domain in every
        for seed in seeds
    ]


def _recipe(sweep: Sweep, method: MethodEntry, setting: dict[str, Any], domain: str | None, seed: int) -> Recipe:
    assert isinstance(sweep.recipe, dict)
    raw = copy.deepcopy(sweep.recipe)
    if method.stages is not None:
        raw["stages"] = copy.deepcopy(method.stages)
    for key, value in {**method.set, **setting}.items():
        override(raw, f"{key}={json.dumps(value)}")
    raw["seed"] = seed
    raw["name"] = slug(method.name)
    if domain is not None:
        raw.setdefault("data", {})["held_out"] = domain
    return parse_recipe(raw, f"method {method.name!r}")


def slug(text: str) -> str:
    """``text`` as a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:90] or "run"


def key_of(recipe: Recipe, stages: int) -> str:
    """What decides the first ``stages`` stages' result, short enough for a folder's name."""
    return identity.digest(recipe, stages)[:12]


def folder_name(recipe: Recipe) -> str:
    """The folder of a run: what it computes decides it, so a sweep may gain, lose and rename methods."""
    data = recipe.data.options.get("held_out")
    steps = "-".join(entry.config.label or entry.kind for entry in recipe.stages)
    return slug(f"{data or recipe.data.name}-s{recipe.seed}-{steps}")[:70] + f"-{key_of(recipe, len(recipe.stages))}"


@dataclass
class Task:
    """One run to do in the folder ``name``: ``base`` is the task whose finished stages it begins with.

    ``wanted``: it is a cell of the table, not only a beginning that others share.
    """

    key: str
    name: str
    recipe: Recipe
    wanted: bool = True
    base: str | None = None


def tasks_of(runs: list[Run]) -> dict[str, Task]:
    """The runs as tasks by key, in order, each after the beginning that it shares with others."""
    named = {run.key: Task(run.key, folder_name(run.recipe), run.recipe) for run in runs}
    shared: Counter[str] = Counter()
    for task in named.values():
        shared.update(key_of(task.recipe, n) for n in range(1, len(task.recipe.stages) + 1))
    tasks: dict[str, Task] = {}
    for task in list(named.values()):
        _add(tasks, named, task, shared)
    return tasks


def _add(tasks: dict[str, Task], named: dict[str, Task], task: Task, shared: Counter[str]) -> None:
    if task.key in tasks:
        return
    recipe = task.recipe
    for n in range(len(recipe.stages) - 1, 0, -1):
        key = key_of(recipe, n)
        if shared[key] > 1 and recipe.stages[n - 1].kind != "export":
            task.base = key
            if key not in named:
                part = recipe.model_copy(update={"stages": recipe.stages[:n]})
                named[key] = Task(key, folder_name(part), part, wanted=False)
            _add(tasks, named, named[key], shared)
            break
    tasks[task.key] = task
