"""What the stages' keys have in common: field types, the base of a training stage, how a wrong key is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from flatcompress import flat
from flatcompress.errors import UserError, nearest, unknown
from flatcompress.training import optimizers, schedules

Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
AveragingKind = Literal["none", "ema", "swa", "swad"]


def _size(value: Any) -> Any:
    """A number with k, M or G behind it, as people write sizes: 200k is 200,000."""
    if isinstance(value, str) and value and value[-1] in _UNITS:
        try:
            return float(value[:-1]) * _UNITS[value[-1]]
        except ValueError:
            return value
    return value


_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
Size = Annotated[float, BeforeValidator(_size), Field(gt=0.0)]


class Strict(BaseModel):
    """A section in which every unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class StageKeys(BaseModel):
    """The keys of one stage."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @property
    def label(self) -> str:
        """The one word that says which: the method, in the ledger and in the terminal."""
        return ""

    @property
    def measures_sharpness(self) -> bool:
        """Whether the ledger's row says how flat the minimum is."""
        return True

    @property
    def epochs_planned(self) -> int | None:
        """Epochs that the stage trains for; None when it does not train."""
        return None

    @property
    def needs_whole(self) -> str | None:
        """What needs every process to have all weights while the stage trains; None where they may be divided."""
        return "the stage ranks, cuts or masks weights by all of them"


def _schedule(value: Any) -> Any:
    """A named schedule; in Python also a function of (step, total), or of an optimizer that makes a torch scheduler."""
    if callable(value) or value in schedules.NAMES or str(value).startswith(FROM_PYTHON):
        return value
    raise ValueError(str(unknown("schedule", str(value), schedules.NAMES)))


def _schedule_name(value: Any) -> str:
    """As a recipe has it: an object given in Python stands there under its name."""
    if isinstance(value, str):
        return value
    return f"{FROM_PYTHON}{getattr(value, '__qualname__', type(value).__qualname__)}"


FROM_PYTHON = "python:"
Schedule = Annotated[
    Any,
    PlainValidator(_schedule),
    PlainSerializer(_schedule_name),
    WithJsonSchema({"enum": list(schedules.NAMES), "type": "string"}),
]


class OptimizerConfig(BaseModel):
    """The base optimizer that a flat-minima method wraps. Further keys go to its class, which must take them."""

    model_config = ConfigDict(extra="allow", validate_default=True, allow_inf_nan=False)

    name: str = Field(
        "adamw", description="base optimizer: sgd, adam, adamw, another of torch.optim, or package.module:Class"
    )
    lr: Positive = Field(3.0e-3, description="peak learning rate")
    weight_decay: NonNegative = Field(1.0e-4, description="weight decay, not applied to quantizer scales")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="momentum (sgd; others: their default)")
    nesterov: bool = Field(True, description="Nesterov momentum (sgd; others: their default)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="moment decay rates (adam, adamw; others: theirs)")

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"the optimizer is a mapping: optimizer: {{name: {value}, lr: 3.0e-3}}")
        return value

    @model_validator(mode="after")
    def _takes_its_keys(self) -> OptimizerConfig:
        if ":" not in self.name:
            self.name = self.name.lower()
        try:
            accepted = optimizers.takes(optimizers.find(self.name)) or {}
        except UserError as error:
            raise KeyProblem("name", str(error)) from None
        extras = self.__pydantic_extra__ or {}
        for key, value in extras.items():
            if isinstance(accepted.get(key), bool | int | float):
                extras[key] = coerce(key, value, float(accepted[key]) if type(accepted[key]) is int else accepted[key])
        problem = optimizers.key_problem(self.name, self.keys, self.weight_decay)
        if problem is not None:
            raise KeyProblem(*problem)
        return self

    @property
    def keys(self) -> dict[str, Any]:
        """What its class is given beside lr and weight_decay."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("momentum", "nesterov", "betas")}
        extras = dict(self.__pydantic_extra__ or {})
        if self.name == "sgd":
            return {"momentum": self.momentum, "nesterov": self.nesterov and self.momentum > 0, **extras}
        if self.name in optimizers.OWN:
            return {"betas": self.betas, **extras}
        return {**{name: value for name, value in own.items() if name in self.model_fields_set}, **extras}

    @property
    def arguments(self) -> tuple[str, float, float, dict[str, Any]]:
        """Name, learning rate, weight decay and `keys`: what `optimizers.build` takes."""
        return self.name, self.lr, self.weight_decay, self.keys

    @model_serializer(mode="wrap")
    def _as_given(self, handler: Any) -> dict[str, Any]:
        """Of a class with defaults of its own only what was given is written down."""
        found: dict[str, Any] = handler(self)
        if self.name not in optimizers.OWN:
            for name in ("momentum", "nesterov", "betas"):
                found.pop(name, None)
                if name in self.model_fields_set:
                    value = getattr(self, name)
                    found[name] = list(value) if isinstance(value, tuple) else value
        return found


class TrainingKeys(StageKeys):
    """Keys shared by the stages that train, and the check of the flat method's hyper-parameters.

    These are not listed one by one: any keyword of the chosen method's row in the registry is a key of the stage, and
    any other key is refused with the nearest spelling.
    """

    model_config = ConfigDict(extra="allow", validate_default=True, allow_inf_nan=False)

    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(10, description="passes over the training split")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="base optimizer")
    schedule: Schedule = Field("one_cycle", description="learning-rate schedule over the stage")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many optimizer steps; the schedule ends there too"
    )
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = Field(
        1, description="batches whose gradients make one optimizer step: k times data.batch_size in the memory of one"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="label smoothing")
    max_grad_norm: Positive | None = Field(None, description="clip the combined gradient to this l2 norm")
    perturb: Literal["per_replica", "synced"] = Field(
        "per_replica", description="in several processes: each climbs by its own batch, or all by the whole batch's"
    )
    select: Literal["best", "last"] = Field(
        "best", description="keep the epoch with the best validation accuracy on the training domains, or the last"
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many epochs in a row without a better one (with select: best)"
    )

    def flat_method(self) -> str:
        """Name of the flat-minima method this stage trains with."""
        raise TypeError("a training stage names its flat method")

    @property
    def epochs_planned(self) -> int:
        """All of them."""
        return self.epochs

    def within(self, steps_per_epoch: int) -> Self:
        """These keys with the epochs that ``max_steps`` leaves; the last may be cut short."""
        most = self.epochs if self.max_steps is None else math.ceil(self.max_steps / steps_per_epoch)
        return self if most >= self.epochs else self.model_copy(update={"epochs": most})

    @property
    def climbs_alone(self) -> str | None:
        """Why the flat method cannot train divided weights; None where it can."""
        method = self.flat_method()
        if flat.METHODS[method].facts.elsewhere:
            return f"method {method!r} runs the network with other weights"
        if method != "none" and self.perturb != "synced":
            return f"method {method!r} climbs in every process by itself (perturb: per_replica; synced is possible)"
        return None

    @property
    def hyper(self) -> dict[str, Any]:
        """The flat method's hyper-parameters given in the recipe."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _ends_sensibly(self) -> TrainingKeys:
        if self.max_steps is not None and not self.epochs:
            raise KeyProblem("max_steps", "epochs: 0 trains nothing: leave it out.")
        if self.patience is not None and self.select != "best":
            raise KeyProblem("patience", "waits for a better epoch, and select: last keeps the last: leave one out.")
        return self

    @model_validator(mode="after")
    def _known_hyper(self) -> TrainingKeys:
        extras = self.__pydantic_extra__ or {}
        accepted = flat_hyper(self.flat_method())
        for key, value in list(extras.items()):
            if key not in accepted:
                known = [*type(self).model_fields, *accepted]
                guess = nearest(key, known)
                hint = f" Did you mean {guess!r}?" if guess else ""
                raise KeyProblem(
                    key,
                    f"unknown key.{hint} Method {self.flat_method()!r} takes {', '.join(accepted) or 'no keys'}; "
                    f"the stage takes {', '.join(type(self).model_fields)}.",
                )
            extras[key] = coerce(key, value, accepted[key])
            _within(self.flat_method(), key, extras[key])
        return self


class KeyProblem(ValueError):
    """A problem with one key of a section, found after the section's own fields were checked."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def flat_hyper(method: str) -> dict[str, Any]:
    """Hyper-parameters of a flat method and their defaults, from its row in the registry."""
    return flat.METHODS[method].defaults


def coerce(key: str, value: Any, default: Any) -> Any:
    """Check a hyper-parameter against the type of its default; YAML reads ``1e-3`` as text, so numbers are parsed."""
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise KeyProblem(key, f"expected true or false, found {value!r}.")
    if isinstance(default, int | float):
        return _number(key, value, type(default))
    return value


def _number(key: str, value: Any, kind: type) -> float | int:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise KeyProblem(key, f"expected a number, found {value!r}.") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise KeyProblem(key, f"expected a finite number, found {value!r}.")
    if kind is int and float(value).is_integer():
        return int(value)
    return value


def _within(method: str, key: str, value: Any) -> None:
    """KeyProblem for a hyper-parameter outside the bounds that stand on its method's row."""
    bounds = flat.METHODS[method].facts.bounds.get(key)
    problem = bounds.problem(value) if bounds is not None and isinstance(value, int | float) else None
    if problem is not None:
        raise KeyProblem(key, f"{problem}, found {value!r}.")


def known_method(value: str, table: Mapping[str, Any], kind: str) -> str:
    """Return ``value`` when it is a key of ``table``, else raise a KeyProblem with the nearest spelling."""
    if value not in table:
        raise KeyProblem("method", str(unknown(kind, value, table)))
    return value


def known_flat_method(name: str, key: str = "method") -> str:
    """Return ``name`` when it is a flat-minima method, else raise a KeyProblem of ``key`` with the nearest spelling."""
    if name not in flat.METHODS:
        raise KeyProblem(key, str(unknown("training method", name, flat.METHODS)))
    return name


class FlatKeys(TrainingKeys):
    """Keys of a stage whose method is a flat-minima method and nothing else."""

    method: str = Field("sam", description="flat-minima method; see `flatcompress list methods`")

    @property
    def label(self) -> str:
        return self.method

    def flat_method(self) -> str:
        return known_flat_method(self.method)


class RemovalKeys(TrainingKeys):
    """Keys shared by the stages that take something away while training: before, during, after."""

    schedule_steps: Annotated[int, Field(ge=1)] = Field(8, description="removal events in step 2")
    removal: Literal["exponential", "cubic", "one_shot"] = Field(
        "exponential", description="removal schedule of step 2"
    )
    warmup_share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.12, description="share of the steps before step 2")
    prune_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.3, description="share of the steps in step 2")
    ignore: list[str] = Field(default_factory=list, description="layers to leave alone: names or re:PATTERN")

    @model_validator(mode="after")
    def _in_epochs(self) -> RemovalKeys:
        if self.max_steps is not None:
            raise KeyProblem("max_steps", "what is removed when is counted in epochs here: give fewer epochs instead.")
        return self

    @model_validator(mode="after")
    def _leaves_step_3(self) -> RemovalKeys:
        if self.warmup_share + self.prune_share >= 1.0:
            raise KeyProblem("prune_share", "warmup_share + prune_share must stay below 1: the rest is step 3.")
        return self


def soft_epochs(config: RemovalKeys) -> int:
    """Epochs of steps 1 and 2, at least one; at least one is left for step 3 when there are two."""
    wanted = math.ceil((config.warmup_share + config.prune_share) * config.epochs)
    return max(1, min(wanted, config.epochs - 1))


def event_steps(config: RemovalKeys, steps_per_epoch: int) -> list[int]:
    """The optimizer steps after which something is removed, evenly spaced over step 2."""
    end = soft_epochs(config) * steps_per_epoch
    total = config.epochs * steps_per_epoch
    start = min(round(config.warmup_share * total), end - 1)
    end = min(end, max(start + config.schedule_steps, round((config.warmup_share + config.prune_share) * total)))
    steps = [
        start + max(1, round((end - start) * r / config.schedule_steps)) for r in range(1, config.schedule_steps + 1)
    ]
    return sorted({min(s, end) for s in steps})
