"""What each stage can be told: typed, described and checked here and nowhere else.

The field descriptions are the reference page, the JSON schema and the error texts. Hyper-parameters of a
flat-minima method (``rho``, ``alpha`` ...) are not listed one by one: any keyword of the chosen method's row in
the registry is a key of the stage, and any other key is refused with the nearest spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flatcompress.errors import nearest, unknown

Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


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


class OptimizerConfig(Strict):
    """The base optimizer that a flat-minima method wraps."""

    name: Literal["sgd", "adam", "adamw"] = Field("adamw", description="base optimizer")
    lr: Positive = Field(3.0e-3, description="peak learning rate")
    weight_decay: NonNegative = Field(1.0e-4, description="weight decay, not applied to quantizer scales")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="momentum (sgd)")
    nesterov: bool = Field(True, description="Nesterov momentum (sgd)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="moment decay rates (adam, adamw)")


class TrainingKeys(BaseModel):
    """Keys shared by the stages that train, and the check of the flat method's hyper-parameters."""

    model_config = ConfigDict(extra="allow", validate_default=True, allow_inf_nan=False)

    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(10, description="passes over the training split")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="base optimizer")
    schedule: Literal["cosine", "one_cycle", "linear", "constant"] = Field(
        "one_cycle", description="learning-rate schedule over the stage"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="label smoothing")
    max_grad_norm: Positive | None = Field(None, description="clip the combined gradient to this l2 norm")
    select: Literal["best", "last"] = Field(
        "best", description="keep the epoch with the best validation accuracy on the training domains, or the last"
    )

    # How an extra key reaches a flat method; a subclass says which method its own `method` key means.
    own_extras: ClassVar[frozenset[str]] = frozenset()

    def flat_method(self) -> str:
        """Name of the flat-minima method this stage trains with."""
        raise TypeError("a training stage names its flat method")

    @property
    def hyper(self) -> dict[str, Any]:
        """The flat method's hyper-parameters given in the recipe."""
        return dict(self.__pydantic_extra__ or {})

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
        return self


class KeyProblem(ValueError):
    """A problem with one key of a section, found after the section's own fields were checked."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def flat_hyper(method: str) -> dict[str, Any]:
    """Hyper-parameters of a flat method and their defaults, from its row in the registry."""
    from flatcompress import flat

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
    if key in _NON_NEGATIVE and value < 0:
        raise KeyProblem(key, f"must be 0 or greater, found {value!r}.")
    if kind is int and float(value).is_integer():
        return int(value)
    return value


_NON_NEGATIVE = frozenset({"rho", "eta", "sigma", "grad_rho", "grad_norm_rho"})


def known_method(value: str, table: Mapping[str, Any], kind: str) -> str:
    """Return ``value`` when it is a key of ``table``, else raise a KeyProblem with the nearest spelling."""
    if value not in table:
        raise KeyProblem("method", str(unknown(kind, value, table)))
    return value


class TrainConfig(TrainingKeys):
    """Train the model into a flat minimum."""

    method: str = Field("sam", description="flat-minima method; see `flatcompress list methods`")
    averaging: Literal["none", "ema", "swa", "swad"] = Field("none", description="average the weights over steps")

    def flat_method(self) -> str:
        from flatcompress import flat

        return known_method(self.method, flat.METHODS, "training method")


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
    def _room_for_step_3(self) -> RemovalKeys:
        if self.warmup_share + self.prune_share >= 1.0:
            raise KeyProblem("prune_share", "warmup_share + prune_share must stay below 1, to leave room for step 3.")
        return self


class PruneConfig(RemovalKeys):
    """Remove channels while training, AdaSAP's three steps: perturb adaptively, remove, train on robustly."""

    method: str = Field("adasap", description="pruning method; see `flatcompress list prune-methods`")
    ratio: Share | None = Field(None, description="share of channels to remove (default 0.5 when no budget is given)")
    macs: Share | None = Field(None, description="budget: multiply-accumulates to keep, as a share")
    params: Share | None = Field(None, description="budget: parameters to keep, as a share")
    bytes: Size | None = Field(
        None, description="budget: bytes of the weights to keep, as a share or absolute (200k, 1.5M), at budget_bits"
    )
    budget_bits: Bits = Field(8, description="bits per weight that a bytes budget is counted at")
    flat: str | None = Field(None, description="flat method while pruning, in place of the pruning method's own")
    importance: str | None = Field(None, description="channel importance; see `flatcompress list importances`")
    rho_min: NonNegative = Field(0.01, description="AdaSAP: radius of the most important channel")
    rho_max: Positive = Field(2.0, description="AdaSAP: radius of the least important channel, and of step 3")
    strength: NonNegative | None = Field(
        None, description="factor of the pull towards zero (masksparsity, group_norm, growing_reg); default: its own"
    )
    norm: Literal["global", "per_neuron"] = Field("global", description="AdaSAP: scope of the perturbation's norm")
    ranking: Literal["global", "uniform"] = Field("global", description="rank channels across layers or within each")
    round_to: Annotated[int, Field(ge=1)] | None = Field(None, description="keep multiples of this many channels")
    min_channels: Annotated[int, Field(ge=1)] = Field(2, description="channels that every layer keeps at least")

    def flat_method(self) -> str:
        from flatcompress.stages.methods import PRUNE_METHODS

        known_method(self.method, PRUNE_METHODS, "pruning method")
        if self.flat is not None:
            from flatcompress import flat

            if self.flat not in flat.METHODS:
                raise KeyProblem("flat", str(unknown("training method", self.flat, flat.METHODS)))
        return self.flat or PRUNE_METHODS[self.method].make().flat

    @model_validator(mode="after")
    def _one_budget(self) -> PruneConfig:
        given = [name for name in ("ratio", "macs", "params", "bytes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise KeyProblem(given[1], f"give one budget, not {' and '.join(given)}.")
        if not given:
            self.ratio = 0.5
        if self.rho_min > self.rho_max:
            raise KeyProblem("rho_min", f"must not exceed rho_max ({self.rho_max}), found {self.rho_min}.")
        if self.importance is not None:
            from flatcompress import prune

            if self.importance not in prune.IMPORTANCES:
                raise KeyProblem("importance", str(unknown("importance", self.importance, prune.IMPORTANCES)))
        return self


class SparsifyConfig(RemovalKeys):
    """Mask single weights while training; the masks hold through every later stage."""

    method: str = Field("sam", description="flat-minima method to train with; see `flatcompress list methods`")
    pattern: str = Field("unstructured", description="unstructured, or N:M such as 2:4 and 1:4 (N stay of every M)")
    sparsity: Share | None = Field(None, description="share of zero weights (unstructured; default 0.5)")
    scope: Literal["global", "layer"] = Field("global", description="rank |w| over all layers or inside each")
    removal: Literal["exponential", "cubic", "one_shot"] = Field("cubic", description="schedule of the events")

    def flat_method(self) -> str:
        from flatcompress import flat

        return known_method(self.method, flat.METHODS, "training method")

    @property
    def target(self) -> float | None:
        """Share of zeros of an unstructured pattern; None for N:M, which says it itself."""
        return self.sparsity

    @model_validator(mode="after")
    def _one_pattern(self) -> SparsifyConfig:
        from flatcompress.errors import UserError
        from flatcompress.prune import masks

        try:
            found = masks.parse_pattern(self.pattern)
        except UserError as error:
            raise KeyProblem("pattern", str(error)) from None
        if found is not None and self.sparsity is not None:
            raise KeyProblem("sparsity", f"pattern {self.pattern!r} says the sparsity itself; leave this key out.")
        if found is None and self.sparsity is None:
            self.sparsity = 0.5
        return self


class QuantizeConfig(TrainingKeys):
    """Quantization-aware training with learned step sizes, and GAQAT's freezing of conflicting scale gradients."""

    method: str = Field("gaqat", description="QAT method; see `flatcompress list qat-methods`")
    weight_bits: Bits = Field(4, description="bits of the weights")
    activation_bits: Bits | None = Field(4, description="bits of the activations; null: they stay float")
    first_last_bits: Bits = Field(8, description="bits of the first and the last layer's weights")
    input_bits: Bits = Field(8, description="bits of the network's input")
    residual_bits: Bits = Field(8, description="bits of signed tensors that feed a residual add")
    per_channel: bool = Field(True, description="one weight scale per output channel")
    quantizer: str = Field("lsq", description="quantizer; see `flatcompress list quantizers`")
    flat: str | None = Field(None, description="flat method during QAT, in place of the QAT method's own")
    ignore: list[str] = Field(default_factory=list, description="layers that stay float: names or re:PATTERN")
    K: Annotated[int, Field(ge=2)] = Field(50, description="GAQAT: steps per disorder window")
    tau: NonNegative = Field(0.3, description="GAQAT: freeze below this disorder")
    tau_kind: Literal["absolute", "quantile", "sigma"] = Field("quantile", description="GAQAT: how tau is read")
    mode: Literal["paper", "gated"] = Field("paper", description="GAQAT: freeze on order alone, or only on opposition")
    freeze_target: Literal["task", "smooth", "both"] = Field("task", description="GAQAT: which gradient is frozen")
    granularity: Literal["quantizer", "layer", "channel"] = Field(
        "quantizer", description="GAQAT: what is frozen together"
    )
    refreeze: bool = Field(True, description="GAQAT: decide anew at every window")
    scale_lr: Positive = Field(0.1, description="learning rate of the quantizer scales, as a share of optimizer.lr")
    perturb_scales: bool = Field(False, description="perturb the quantizer scales with the weights")
    perturb_point: Literal["latent", "quantized"] | None = Field(
        None, description="perturb the weights before or after their quantizer; default: the method's own"
    )
    quant_start: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="share of the epochs trained float before the quantizers come in; default: the method's own"
    )
    bloop: NonNegative | None = Field(
        None, description="strength of the scales' smoothness gradient across their task gradient; default: off"
    )
    dampen: NonNegative = Field(0.0, description="weight, at the end, of the pull of oscillating weights to their grid")
    oscillation_threshold: Positive | None = Field(
        None, description="freeze weights that change sides more often than this, at the end (0.01); default: off"
    )
    distill: NonNegative = Field(0.0, description="weight of distillation from the float model")
    bias_rounding_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="last epochs that train with the exported file's rounded biases"
    )

    def flat_method(self) -> str:
        from flatcompress.stages.methods import QAT_METHODS

        known_method(self.method, QAT_METHODS, "QAT method")
        if self.flat is not None:
            from flatcompress import flat

            if self.flat not in flat.METHODS:
                raise KeyProblem("flat", str(unknown("training method", self.flat, flat.METHODS)))
        return self.flat or QAT_METHODS[self.method].make().flat

    @model_validator(mode="after")
    def _fits_method(self) -> QuantizeConfig:
        from flatcompress.stages.methods import QAT_METHODS

        method = QAT_METHODS[self.method].make()
        if method.weights_only:
            if "activation_bits" in self.model_fields_set and self.activation_bits is not None:
                raise KeyProblem(
                    "activation_bits", f"method {self.method!r} quantizes weights alone: null, or leave out."
                )
            self.activation_bits = None
        if method.conflict and self.flat_method() == "none":
            raise KeyProblem(
                "flat", f"method {self.method!r} compares two gradients of a scale; 'none' takes only one."
            )
        if self.perturb_scales and (self.perturb_point or method.point) == "quantized":
            raise KeyProblem(
                "perturb_scales", "not with a perturbation after the quantizer, which leaves scales alone."
            )
        return self

    @model_validator(mode="after")
    def _known_quantizer(self) -> QuantizeConfig:
        from flatcompress import quant

        if self.quantizer not in quant.QUANTIZERS:
            raise KeyProblem("quantizer", str(unknown("quantizer", self.quantizer, quant.QUANTIZERS)))
        return self


class ExportConfig(Strict):
    """Write the ONNX file and prove that it is the model that was trained."""

    profile: str = Field("packed", description="file format; see `flatcompress list profiles`")
    opset: Annotated[int, Field(ge=13, le=28)] | None = Field(
        None, description="ONNX opset; default: lowest that works"
    )
    latency: bool = Field(True, description="measure latency beside the float model's")
    threads: Annotated[int, Field(ge=1, le=256)] = Field(1, description="onnxruntime threads for the latency")

    @model_validator(mode="after")
    def _known_profile(self) -> ExportConfig:
        from flatcompress import onnx_export

        if self.profile not in onnx_export.PROFILES:
            raise KeyProblem("profile", str(unknown("profile", self.profile, onnx_export.PROFILES)))
        return self


StageConfig = TrainConfig | PruneConfig | SparsifyConfig | QuantizeConfig | ExportConfig
STAGE_CONFIGS: dict[str, type[Strict] | type[TrainingKeys]] = {
    "train": TrainConfig,
    "prune": PruneConfig,
    "sparsify": SparsifyConfig,
    "quantize": QuantizeConfig,
    "export": ExportConfig,
}
