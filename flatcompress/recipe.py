"""The recipe: YAML in, a typed `Recipe` out, or an error a person can act on.

Every error names the file, the line, the key, what was found, what is allowed and the nearest valid spelling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flatcompress.errors import UserError, nearest
from flatcompress.registry import shown
from flatcompress.stages.configs import (
    STAGE_CONFIGS,
    ExportConfig,
    KeyProblem,
    PruneConfig,
    QuantizeConfig,
    SparsifyConfig,
    Strict,
    TrainConfig,
)
from flatcompress.yaml_source import MAX_BYTES, override, parse_yaml


class DataConfig(BaseModel):
    """Which data set. Keys beyond these go to the data set itself (`flatcompress list data`)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    name: str = Field("rotated-digits", description="data set; see `flatcompress list data`")
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = Field(64, description="samples per step and process")
    workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="data-loading processes")

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


class StageEntry(Strict):
    """One item of ``stages``: exactly one stage name with its keys."""

    train: TrainConfig | None = None
    prune: PruneConfig | None = None
    sparsify: SparsifyConfig | None = None
    quantize: QuantizeConfig | None = None
    export: ExportConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_stage(cls, value: Any) -> Any:
        if isinstance(value, str) and value in STAGE_CONFIGS:
            value = {value: {}}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"a stage is one of {', '.join(STAGE_CONFIGS)} with its keys below it, found {value!r}")
        return {k: {} if v is None else v for k, v in value.items()}

    @property
    def kind(self) -> str:
        """The stage's name."""
        return next(k for k in STAGE_CONFIGS if getattr(self, k) is not None)

    @property
    def config(self) -> Any:
        """The stage's keys."""
        return getattr(self, self.kind)


def _plain_no(value: Any) -> Any:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


class Recipe(Strict):
    """Everything a run needs, every default written out."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="name of the run folder: letters, digits, . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="fixes every random choice")
    output_dir: str = Field("runs", description="where run folders go")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field("auto", description="where to train")
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
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="the data")
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description="the model")
    stages: Annotated[list[StageEntry], Field(min_length=1)] = Field(description="what happens to the model, in order")

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        check_names(self)
        check_order(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default written out; loads back to an equal recipe."""
        raw = self.model_dump(mode="json", exclude={"stages"})
        raw["stages"] = [{s.kind: s.config.model_dump(mode="json")} for s in self.stages]
        return raw

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def check_names(recipe: Recipe) -> None:
    """The data set and a built-in model must be registered; everything else is checked when it is loaded."""
    from flatcompress import data, models

    for section, registry in (("data", data.DATASETS), ("model", models.MODELS)):
        name = getattr(recipe, section).name
        if (section == "model" and ":" in name) or (section == "data" and name == "python"):
            continue
        try:
            registry[name]
        except UserError as error:
            raise KeyProblem(f"{section}.name", str(error)) from None


def check_order(recipe: Recipe) -> None:
    """Refuse an order of stages that makes no sense, with the reason, before anything runs."""
    kinds = [s.kind for s in recipe.stages]
    for i, kind in enumerate(kinds):
        reason = _order_problem(recipe, kinds, i, kind)
        if reason:
            raise KeyProblem(f"stages.{i}.{kind}", reason)


def _order_problem(recipe: Recipe, kinds: list[str], i: int, kind: str) -> str | None:
    before = kinds[:i]
    if "export" in before and kind != "export":
        return f"'{kind}' comes after 'export': the file is already written. Put 'export' last."
    if kind == "prune" and "quantize" in before:
        return "'prune' comes after 'quantize': cutting channels would reset the learned scales. Prune first."
    if kind == "train" and "quantize" in before:
        return "'train' comes after 'quantize': put those epochs into the quantize stage, which trains too."
    if kind == "quantize" and "quantize" in before:
        return "the model is already quantized by an earlier stage. Quantize once."
    if kind == "sparsify" and "quantize" in before:
        return "'sparsify' comes after 'quantize': the learned scales fit the dense weights. Sparsify first."
    if kind == "prune" and "sparsify" in before:
        return "'prune' comes after 'sparsify': a cut would break the masks' pattern. Prune channels first."
    trained = "train" in before or recipe.model.weights or ":" in recipe.model.name
    if kind in ("prune", "sparsify") and not trained:
        return f"'{kind}' would rank random weights. Put a 'train' stage before it or give model.weights."
    if kind == "export":
        return _export_problem(recipe, before, i)
    return None


def _export_problem(recipe: Recipe, before: list[str], i: int) -> str | None:
    profile = recipe.stages[i].config.profile
    is_float = profile.startswith("float")
    if not before and not (recipe.model.weights or ":" in recipe.model.name):
        return "'export' has nothing trained to export. Put stages before it or give model.weights."
    if not is_float and "quantize" not in before:
        return f"profile '{profile}' stores quantized weights: put 'quantize' before it, or use profile: float32."
    if is_float and "quantize" in before:
        return f"profile '{profile}' is for float models, and an earlier stage quantizes. Use profile: packed."
    profiles = [recipe.stages[j].config.profile for j in range(i) if recipe.stages[j].kind == "export"]
    return f"profile '{profile}' is already written by an earlier export." if profile in profiles else None


def parse_recipe(raw: Any, where: str = "recipe", lines: dict[tuple[Any, ...], int] | None = None) -> Recipe:
    """Check plain data and return the `Recipe`. UserError lists every problem found, one a line."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a recipe is a mapping of keys (name, data, model, stages ...), found {_short(raw)}.")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_message(e, where, lines or {}) for e in error.errors()]
        raise UserError("\n".join(dict.fromkeys(problems))) from None


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe file. UserError for everything that is wrong with it."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes is no recipe; at most {MAX_BYTES} are read.")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"{path}: cannot be read ({reason}). Give the path of a recipe, or write one: flatcompress init."
        ) from None
    raw, lines = parse_yaml(text, str(path))
    for setting in overrides:
        if not isinstance(raw, dict):
            break
        override(raw, setting)
    return parse_recipe(raw, str(path), lines)


def _message(error: Any, where: str, lines: dict[tuple[Any, ...], int]) -> str:
    loc = list(error["loc"])
    cause = (error.get("ctx") or {}).get("error")
    if isinstance(cause, KeyProblem):
        loc += [int(k) if k.isdigit() else k for k in cause.key.split(".")]
    line = _line(loc, lines)
    at = f"{where}:{line}" if line else where
    key = ".".join(str(k) for k in loc) or "recipe"
    return f"{at}: {key}: {_what(error, loc, cause)}"


def _line(loc: list[Any], lines: dict[tuple[Any, ...], int]) -> int | None:
    """The line of the key, or of the closest parent that stands in the file."""
    for end in range(len(loc), -1, -1):
        if tuple(loc[:end]) in lines:
            return lines[tuple(loc[:end])]
    return None


def _what(error: Any, loc: list[Any], cause: Any) -> str:
    if isinstance(cause, KeyProblem):
        return str(cause)
    if error["type"] == "extra_forbidden":
        return _unknown_key(loc)
    if error["type"] == "missing":
        return "this key is missing."
    found = f", found {_short(error['input'])}" if "found" not in error["msg"] else ""
    return f"{error['msg'].removeprefix('Value error, ')}{found}."


def _unknown_key(loc: list[Any]) -> str:
    known = _known_keys(loc[:-1])
    guess = nearest(str(loc[-1]), known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown key.{hint} Allowed: {', '.join(known)}."


def _known_keys(loc: list[Any]) -> list[str]:
    model: Any = Recipe
    for key in loc:
        if key == "stages" or isinstance(key, int):
            model = StageEntry
            continue
        named = {"data": DataConfig, "model": ModelConfig, **STAGE_CONFIGS}
        field = model.model_fields.get(key)
        model = named.get(key) or (field.annotation if field else None)
        if not hasattr(model, "model_fields"):
            return []
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; each stage's schema lists the flat methods' hyper-parameters too."""
    from flatcompress import flat

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    hyper = {key: _hyper_schema(defaults) for key, defaults in flat.defaults_by_method().items()}
    for name in ("TrainConfig", "PruneConfig", "SparsifyConfig", "QuantizeConfig"):
        section = schema["$defs"][name]
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
