"""A search file: the base recipe, what may vary, what is wanted, how long, and where the study is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from flatcompress.errors import UserError, nearest
from flatcompress.recipe.schema import NAME
from flatcompress.stages.keys import Bits, Size, Strict
from flatcompress.sweep.spec import Resources, base_recipe, load_file

OBJECTIVES = {  # what a trial can be judged by -> what it is
    "robust": "mean of the accuracies on the held-out domain and under corruption, those that there are",
    "held_out": "accuracy on the held-out domain",
    "corrupted": "mean accuracy under corruption",
    "test": "accuracy on the test split",
    "val": "validation accuracy, on the source domains, of what the last stage kept",
    "sharpness": "one-step sharpness of the last stage's minimum",
    "bytes": "of the weights at their bits; of the file where the recipe exports",
    "macs": "multiply-accumulates of one sample",
    "params": "parameters",
    "ms": "milliseconds in onnxruntime here, int8, by a table of measured layers (same widths and bits, same figure)",
    "flash": "bytes of flash of the C on a Cortex-M4, estimated (needs a quantize stage)",
    "ram": "bytes of the C's arena (needs a quantize stage)",
    "instructions": "instructions of one inference of the C on a Cortex-M4, estimated (needs a quantize stage)",
    "latency_ms": "milliseconds of the exported file, measured anew each time (needs an export stage)",
}
COSTS = ("bytes", "macs", "params", "ms", "flash", "ram", "instructions", "latency_ms")


def _seconds(value: Any) -> Any:
    if isinstance(value, str) and value[-1:] in ("s", "m", "h"):
        try:
            return float(value[:-1]) * {"s": 1, "m": 60, "h": 3600}[value[-1]]
        except ValueError:
            return value
    return value


Removed = Annotated[float, Field(ge=0.0, lt=1.0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


class Range(Strict):
    """What one key may be. One of: ``choice``; ``together``; ``low`` and ``high``; ``per_layer``; ``per_group``."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = Field(None, description="one of these values")
    together: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = Field(
        None, description="one of these settings, each {recipe key: value}; the name of this key is free"
    )
    low: float | int | None = Field(None, description="smallest number")
    high: float | int | None = Field(None, description="largest number, included")
    step: Annotated[float | int, Field(gt=0)] | None = Field(None, description="distance of the numbers tried")
    log: bool = Field(False, description="drawn evenly on a logarithmic scale")
    per_layer: Annotated[list[Bits], Field(min_length=1)] | None = Field(
        None, description="bits to choose from for every layer that is free to choose (key quantize.bits)"
    )
    per_group: Annotated[list[Removed], Field(min_length=1)] | None = Field(
        None, description="shares of channels to remove, to choose from for every group (key prune.ratios)"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        numbers = self.low is not None or self.high is not None
        every: tuple[list[Any] | None, ...] = (self.choice, self.together, self.per_layer, self.per_group)
        if numbers + sum(values is not None for values in every) != 1:
            raise ValueError("give one of choice, together, low with high, per_layer, per_group")
        if numbers:
            self._check_numbers()
        elif self.log or self.step is not None:
            raise ValueError("log and step go with low and high")
        for values in every:
            if values is not None and any(values.count(v) > 1 for v in values):
                raise ValueError("a value is given twice")
        return self

    def _check_numbers(self) -> None:
        if self.low is None or self.high is None:
            raise ValueError("low and high go together")
        if self.low > self.high:
            raise ValueError(f"the range is empty: low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("log needs low above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together")

    @property
    def whole(self) -> bool:
        """Whole numbers alone?"""
        return all(isinstance(v, int) for v in (self.low, self.high, 1 if self.step is None else self.step))


Fidelity = Literal["post_training", "full"] | Annotated[int, Field(ge=1)]


class Search(Strict):
    """A search file."""

    name: Annotated[str, Field(pattern=NAME)] = Field("search", description="name of the folder and of the study")
    output_dir: str = Field("runs", description="where the search's folder goes")
    recipe: str | dict[str, Any] = Field(description="base recipe: a file, or its keys")
    space: Annotated[dict[str, Range], Field(min_length=1)] = Field(description="recipe key -> what it may be")
    objectives: Annotated[dict[str, Literal["maximize", "minimize"]], Field(min_length=1)] = Field(
        {"robust": "maximize", "bytes": "minimize", "ms": "minimize"}, description="what the front is of"
    )
    budgets: dict[str, Size] = Field(default_factory=dict, description="what a point may cost at most: {bytes: 40k}")
    n_trials: Annotated[int, Field(ge=1, le=100_000)] = Field(40, description="points that are tried")
    timeout: Seconds | None = Field(None, description="begin nothing after so long (90s, 5m, 2h)")
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many fully trained points in a row that leave the front as it was"
    )
    sampler: Literal["tpe", "nsga2", "random"] = Field("tpe", description="Optuna's sampler")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of what is tried; a recipe's is its own")
    fidelities: Annotated[list[Fidelity], Field(min_length=1)] = Field(
        ["post_training", 1, "full"], description="from cheap to full: post_training, epochs a stage, full"
    )
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = Field(
        2, description="one in so many goes on to the next fidelity (eta of successive halving)"
    )
    full_stages: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="leading stages that are trained in full at every fidelity, once for all points that agree in them "
        "(default: those in which nothing varies)",
    )
    warm_start: Annotated[int, Field(ge=0, le=1000)] = Field(
        8, description="first points by sensitivities of layers and importances of groups"
    )
    starts: list[dict[str, Any] | str] = Field(
        default_factory=list,
        description="points of your own, trained in full first: {key of the space: value}, or a recipe or its file",
    )
    storage: str | None = Field(None, description="Optuna storage: a URL (default: SQLite in the search's folder)")
    jobs: Annotated[int, Field(ge=1, le=256)] = Field(1, description="runs at the same time in the local pool")
    storage_path: str | None = Field(None, description="on Ray: folder or fsspec URL that all machines reach")
    resources: Resources = Field(default_factory=lambda: Resources(), description="on Ray: {cpu, gpu} of a run")

    @model_validator(mode="after")
    def _sensible(self) -> Search:
        for name in self.objectives:
            _known(name, OBJECTIVES, "objective")
        for name in self.budgets:
            _known(name, COSTS, "budget")
        if self.fidelities[-1] != "full":
            raise ValueError("fidelities: the last is full")
        order = [0 if f == "post_training" else 10**9 if f == "full" else int(f) for f in self.fidelities]
        if order != sorted(set(order)):
            raise ValueError("fidelities: from cheap to full, each once: post_training, epochs, full")
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this search is."""
        return Path(self.output_dir) / self.name

    @property
    def top(self) -> int:
        """Index of the last fidelity."""
        return len(self.fidelities) - 1


def _known(name: str, known: Any, kind: str) -> None:
    if name not in known:
        guess = nearest(name, known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ValueError(f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(known)}")


def load_search(path: str | Path) -> Search:
    """Read and check a search file. UserError for everything that is wrong with it."""
    found = load_file(path, "search", parse_search)
    found.starts = [base_recipe(Path(path), start) if isinstance(start, str) else start for start in found.starts]
    return found


def parse_search(raw: Any, where: str = "search") -> Search:
    """Check plain data and return the `Search`. UserError lists every problem, one a line."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a search is a mapping of keys (recipe, space, objectives ...).")
    try:
        return Search.model_validate(raw)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key, message = ".".join(map(str, e["loc"])) or "search", e["msg"].removeprefix("Value error, ")
            if e["type"] == "extra_forbidden":
                fields = Range.model_fields if e["loc"][0] == "space" else Search.model_fields
                guess = nearest(str(e["loc"][-1]), fields)
                hint = f" Did you mean {guess!r}?" if guess else ""
                message = f"unknown key.{hint} Allowed: {', '.join(fields)}"
            lines.append(f"{where}: {key}: {message}.")
        raise UserError("\n".join(lines)) from None
