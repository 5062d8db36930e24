"""The typed recipe: what it may say, and the JSON schema of that."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from flatcompress import data, extensions, flat, models, tasks
from flatcompress.errors import UserError, nearest
from flatcompress.registry import shown
from flatcompress.stages import STAGES, StageKeys, order_problem, stage_of
from flatcompress.stages.keys import KeyProblem, Strict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # of a run, a sweep or a search, which is its folder's


class DataConfig(BaseModel):
    """Which data set. Keys beyond these go to the data set itself (`flatcompress list data`)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    name: str = Field("rotated-digits", description="data set; see `flatcompress list data`")
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = Field(64, description="samples per step and process")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="data-loading processes")
    balance_domains: bool = Field(False, description="every batch has as many samples of each training domain")

    @property
    def options(self) -> dict[str, Any]:
        """The data set's own keys."""
        return dict(self.__pydantic_extra__ or {})


class ModelConfig(BaseModel):
    """Which model. Keys beyond these go to the model's constructor."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    name: str = Field(
        "resnet8", description="built-in | timm:NAME | torchvision:NAME | transformers:TYPE | package.module:factory"
    )
    weights: str | None = Field(None, description="initial weights: a safetensors file or a state dict")
    config: dict[str, Any] | None = Field(None, description="keys of a transformers model's config")

    @property
    def options(self) -> dict[str, Any]:
        """The model's own keys."""
        return dict(self.__pydantic_extra__ or {})


SCHEMA = 6  # of what a recipe means: raised when a default or what it does changes, so no older run counts as the same


@dataclass(frozen=True)
class StageEntry:
    """One item of ``stages``: a kind and its keys."""

    kind: str
    config: Any

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe, every default written out."""
        return {self.kind: self.config.model_dump(mode="json")}


def _stage_entry(value: Any) -> StageEntry:
    if isinstance(value, StageEntry):
        return value
    if isinstance(value, str) and value in STAGES:
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a stage is one of {', '.join(STAGES)} with its keys below it, found {value!r}")
    (kind, keys), *_ = value.items()
    if kind not in STAGES:
        guess = nearest(str(kind), STAGES)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise KeyProblem(str(kind), f"unknown stage.{hint} Allowed: {', '.join(STAGES)}.")
    # A section with the stage's name around its keys, so that an error's place is stages.1.prune.ratio.
    section: Any = create_model("Stage", **{kind: (stage_of(kind).config, ...)})  # type: ignore[call-overload]
    return StageEntry(kind, getattr(section.model_validate({kind: {} if keys is None else keys}), kind))


Spread = tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]
Entry = Annotated[StageEntry, PlainValidator(_stage_entry), WithJsonSchema({"type": "object"}, mode="validation")]


DEVICES = r"^(auto|cpu|mps|cuda(:\d+)?)$"


def _device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(DEVICES, value):
        hint = " (a GPU of NVIDIA is cuda, the second cuda:1)" if "gpu" in value.lower() or "cuda" in value else ""
        raise ValueError(f"unknown device {value!r}. Allowed: auto, cpu, mps, cuda, cuda:N{hint}.")
    return value


def _plain_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


class Recipe(Strict):
    """Everything a run needs, every default written out."""

    name: Annotated[str, Field(pattern=NAME)] = Field(
        "run", description="name of the run folder: letters, digits, . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="fixes every random choice")
    output_dir: str = Field("runs", description="where run folders go")
    device: Annotated[str, Field(pattern=DEVICES), BeforeValidator(_device)] = Field(
        "auto", description="where to train"
    )
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_plain_no)] = Field(
        "no", description="mixed precision while training"
    )
    checkpoint_every: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?[smh]$")] = Field(
        "5m", description="save inside a stage every so many steps (a number) or seconds, minutes, hours (90s, 5m, 2h)"
    )
    on_divergence: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="a value that is not finite: stop, leave the step out, or go back at half the learning rate"
    )
    max_rollbacks: Annotated[int, Field(ge=1, le=100)] = Field(3, description="rollbacks of one stage before it stops")
    on_out_of_memory: Literal["stop", "halve"] = Field(
        "stop", description="out of memory: stop, or work through each batch in two, four ... parts"
    )
    log: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default_factory=list, description="trackers that get the log's events as well"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="CPU threads (default: all)")
    memory_format: Literal["auto", "channels_last", "contiguous"] = Field(
        "auto", description="how images and weights lie while training; auto: channels last for depthwise nets on a CPU"
    )
    compile: bool = Field(
        False, description="training steps through torch.compile: needs a C++ compiler, or Triton on a GPU"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several processes: each has all weights, or train and quantize divide weights, gradients and the "
        "optimizer's state over them (FSDP2)",
    )
    measure: Literal["quick", "full", "off"] = Field(
        "quick",
        description="sharpness, also by layer, the flatness map, accuracy under corruption and the proof: of samples, "
        "layers and kinds that take at most a quarter of the training, of all, or off, which proves all the same",
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="the data")
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description="the model")
    task: str | dict[str, Any] | None = Field(
        None, description="what is learned: a name of `flatcompress list tasks`, or name and keys (default: the data's)"
    )
    expected: dict[str, Spread] | None = Field(
        None, description="mean and standard deviation of the last stage's accuracies, as shares, to compare a run with"
    )
    stages: Annotated[list[Entry], Field(min_length=1)] = Field(description="what happens to the model, in order")

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        check_names(self)
        check_order(self)
        check_strategy(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default written out; loads back to an equal recipe."""
        raw = {"schema": SCHEMA, **self.model_dump(mode="json", exclude={"stages"})}
        raw["stages"] = [entry.to_dict() for entry in self.stages]
        return raw

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def check_names(recipe: Recipe) -> None:
    """Data set, task and a built-in model must be registered; everything else is checked when it is loaded."""
    if recipe.task is not None and not _from_python(recipe.task):
        try:
            tasks.build(recipe.task)
        except (UserError, TypeError) as error:
            raise KeyProblem("task", str(error)) from None
    for section, registry in (("data", data.DATASETS), ("model", models.MODELS)):
        name = getattr(recipe, section).name
        if (section == "model" and ":" in name) or (section == "data" and name == "python"):
            continue
        try:
            registry[name]
        except UserError as error:
            raise KeyProblem(f"{section}.name", str(error)) from None


def _from_python(task: Any) -> bool:
    """Does it stand for an object that was given in Python?"""
    return isinstance(task, dict) and str(task.get("name")).startswith("python:")


def check_order(recipe: Recipe) -> None:
    """Refuse an order of stages that makes no sense, with the reason, before anything runs."""
    has_weights = bool(recipe.model.weights) or ":" in recipe.model.name
    earlier: list[tuple[str, StageKeys]] = []
    for i, entry in enumerate(recipe.stages):
        reason = order_problem(entry.kind, entry.config, earlier, has_weights)
        if reason:
            raise KeyProblem(f"stages.{i}.{entry.kind}", reason)
        earlier.append((entry.kind, entry.config))


def check_strategy(recipe: Recipe) -> None:
    """Refuse what divided weights do not allow, before anything runs."""
    if recipe.strategy != "fsdp":
        return
    if recipe.compile:
        raise KeyProblem("compile", "divided weights (strategy: fsdp) are trained without it. Leave it out.")
    if recipe.precision == "fp16":
        raise KeyProblem("precision", "fp16 scales losses, which does not go with strategy: fsdp. Take bf16 or no.")
    if recipe.memory_format == "channels_last":
        raise KeyProblem("memory_format", "strategy: fsdp divides contiguous weights. Take contiguous or auto.")
    for i, entry in enumerate(recipe.stages):
        if entry.config.needs_whole is not None:
            raise KeyProblem(
                f"stages.{i}.{entry.kind}",
                f"{entry.config.needs_whole}, and strategy: fsdp divides the weights over the processes. Take ddp.",
            )


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; each stage's schema lists the flat methods' hyper-parameters too."""
    extensions.load()
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    configs = {kind: stage_of(kind).config for kind in STAGES}
    names, stages = models_json_schema([(config, "validation") for config in configs.values()])
    references = {kind: names[config, "validation"] for kind, config in configs.items()}
    schema["$defs"] |= stages["$defs"] | {"StageEntry": _entry_schema(references)}
    schema["properties"]["schema"] = {"description": "version of what a recipe means", "maximum": SCHEMA, "minimum": 1}
    schema["properties"]["stages"]["items"] = {"$ref": "#/$defs/StageEntry"}
    hyper = {key: _hyper_schema(defaults) for key, defaults in flat.defaults_by_method().items()}
    for kind, config in configs.items():
        if not stage_of(kind).trains:
            continue
        section = schema["$defs"][config.__name__]
        section["additionalProperties"] = False
        for key, described in hyper.items():
            section["properties"].setdefault(key, described)
    return json.loads(json.dumps(schema))


def _hyper_schema(defaults: dict[str, Any]) -> dict[str, Any]:
    """A hyper-parameter's description; its default where the methods that take it agree."""
    by_method = {name: shown(value) for name, value in defaults.items()}
    values = list(by_method.values())
    if all(value == values[0] for value in values):
        where = ", ".join(by_method)
        return {"description": f"hyper-parameter of the flat method ({where})", "default": values[0]}
    where = ", ".join(f"{name} {value}" for name, value in by_method.items())
    return {"description": f"hyper-parameter of the flat method; default by method: {where}"}


def _entry_schema(references: dict[str, Any]) -> dict[str, Any]:
    """A stage: its name alone, or its name with its keys below it."""
    keys = {kind: {"anyOf": [reference, {"type": "null"}]} for kind, reference in references.items()}
    one = {"type": "object", "properties": keys, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [one, {"enum": list(keys)}]}
