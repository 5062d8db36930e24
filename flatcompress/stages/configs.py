"""What each stage can be told: typed, described and checked here and nowhere else.

The field descriptions are the reference page, the JSON schema and the error texts. Hyper-parameters of a
flat-minima method (``rho``, ``alpha`` ...) are not listed one by one: any keyword of the chosen method's row in
the registry is a key of the stage, and any other key is refused with the nearest spelling.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flatcompress.errors import unknown
from flatcompress.stages.keys import (
    AveragingKind,
    Bits,
    KeyProblem,
    NonNegative,
    OptimizerConfig,
    Positive,
    RemovalKeys,
    Share,
    Size,
    Strict,
    TrainingKeys,
    flat_hyper,
    known_method,
)

__all__ = [
    "STAGE_CONFIGS",
    "ExportConfig",
    "KeyProblem",
    "OptimizerConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RemovalKeys",
    "SparsifyConfig",
    "StageConfig",
    "Strict",
    "TrainConfig",
    "TrainingKeys",
    "flat_hyper",
]


class TrainConfig(TrainingKeys):
    """Train the model into a flat minimum."""

    method: str = Field("sam", description="flat-minima method; see `flatcompress list methods`")
    averaging: AveragingKind = Field("none", description="average the weights over steps")

    def flat_method(self) -> str:
        from flatcompress import flat

        return known_method(self.method, flat.METHODS, "training method")


PRUNE_BUDGETS = ("ratio", "macs", "params", "bytes", "latency", "latency_ms")


class PruneConfig(RemovalKeys):
    """Remove channels while training, AdaSAP's three steps: perturb adaptively, remove, train on robustly."""

    late_keys: ClassVar[frozenset[str]] = frozenset({"percentile", "floor"})

    method: str = Field("adasap", description="pruning method; see `flatcompress list prune-methods`")
    ratio: Share | None = Field(None, description="share of channels to remove (default 0.5 when no budget is given)")
    macs: Share | None = Field(None, description="budget: multiply-accumulates to keep, as a share")
    params: Share | None = Field(None, description="budget: parameters to keep, as a share")
    bytes: Size | None = Field(
        None, description="budget: bytes of the weights to keep, as a share or absolute (200k, 1.5M), at budget_bits"
    )
    budget_bits: Bits = Field(8, description="bits per weight that a bytes budget is counted at")
    latency: Share | None = Field(
        None, description="budget: share of the dense model's int8 latency, measured per layer in onnxruntime here"
    )
    latency_ms: Positive | None = Field(None, description="budget: milliseconds in onnxruntime here, int8, one sample")
    flat: str | None = Field(None, description="flat method while pruning, in place of the pruning method's own")
    importance: str | None = Field(None, description="channel importance; see `flatcompress list importances`")
    rho_min: NonNegative = Field(0.01, description="AdaSAP: radius of the most important channel")
    rho_max: Positive = Field(2.0, description="AdaSAP: radius of the least important channel, and of step 3")
    strength: NonNegative | None = Field(
        None, description="factor of the pull towards zero (masksparsity, group_norm, growing_reg); default: its own"
    )
    norm: Literal["global", "per_neuron"] = Field("global", description="AdaSAP: scope of the perturbation's norm")
    percentile: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="AdaSAP: clip the scores that make the radii at this percentile; default: no clipping"
    )
    ranking: Literal["global", "uniform", "isomorphic"] = Field(
        "global", description="rank channels across layers, within each, or across layers of the same structure"
    )
    round_to: Annotated[int, Field(ge=1)] | None = Field(None, description="keep multiples of this many channels")
    min_channels: Annotated[int, Field(ge=1)] = Field(2, description="channels that every layer keeps at least")
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="share of its channels that every layer keeps at least; default: 0.1"
    )

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
        given = [name for name in PRUNE_BUDGETS if getattr(self, name) is not None]
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


BITS_BUDGETS = ("effective_bits", "bytes", "bops")


class QuantizeConfig(TrainingKeys):
    """Quantization-aware training with learned step sizes, and GAQAT's freezing of conflicting scale gradients."""

    late_keys: ClassVar[frozenset[str]] = frozenset({"averaging", "flatness_map", "freeze_bn", "remedy"})

    method: str = Field("gaqat", description="QAT method; see `flatcompress list qat-methods`")
    weight_bits: Bits = Field(4, description="bits of the weights")
    activation_bits: Bits | None = Field(4, description="bits of the activations; null: they stay float")
    bits: Literal["auto"] | dict[str, Any] | None = Field(
        None, description="auto: by sensitivity within a budget; or bits per layer: {fc: 8, 're:layer1.*': {weight: 3}}"
    )
    effective_bits: Annotated[float, Field(ge=2, le=8)] | None = Field(
        None, description="bits: auto, budget: mean bits per weight (default: weight_bits)"
    )
    bytes: Size | None = Field(None, description="bits: auto, budget: bytes of all quantized weights (200k)")
    bops: Size | None = Field(None, description="bits: auto, budget: MACs x weight bits x activation bits (1.5G)")
    sensitivity: Literal["measured", "hessian", "gradient"] = Field(
        "measured", description="bits: auto, a layer's cost: measured, by Hessian trace, or by one backward pass"
    )
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
    mode: Literal["paper", "gated", "opposed"] = Field(
        "paper", description="GAQAT: freeze on order alone, on order with lasting opposition, or on opposition alone"
    )
    freeze_target: Literal["task", "smooth", "both"] = Field("task", description="GAQAT: which gradient is frozen")
    granularity: Literal["quantizer", "layer", "channel"] = Field(
        "quantizer", description="GAQAT: what is frozen together"
    )
    refreeze: bool = Field(True, description="GAQAT: decide anew at every window")
    remedy: Literal["freeze", "slow", "project"] = Field(
        "freeze",
        description="GAQAT: freeze a gradient, take a tenth of the step, or project the smaller of opposing gradients",
    )
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
    averaging: AveragingKind = Field("none", description="average the weights and scales over steps")
    freeze_bn: bool = Field(False, description="BatchNorm keeps its running statistics, as DomainBed's networks do")
    flatness_map: bool = Field(
        True, description="log how far each layer may move (Hessian trace) against how far its grid moves it"
    )
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

    @property
    def bits_budget(self) -> tuple[str, float]:
        """(unit, value) of the budget that ``bits: auto`` keeps."""
        given = [(unit, v) for unit in BITS_BUDGETS if (v := getattr(self, unit)) is not None]
        return given[0] if given else ("effective_bits", float(self.weight_bits))

    @model_validator(mode="before")
    @classmethod
    def _sensitivity_as_ever(cls, keys: Any) -> Any:
        """Without bits: auto the key decides nothing; it stays what recipes were hashed with before ``measured``."""
        if isinstance(keys, dict) and keys.get("bits") != "auto" and "sensitivity" not in keys:
            return keys | {"sensitivity": "hessian"}
        return keys

    @model_validator(mode="after")
    def _one_bits_budget(self) -> QuantizeConfig:
        given = [unit for unit in BITS_BUDGETS if getattr(self, unit) is not None]
        if given and self.bits != "auto":
            raise KeyProblem(given[0], "a budget of bits goes with bits: auto.")
        if len(given) > 1:
            raise KeyProblem(given[1], f"give one budget of bits, not {' and '.join(given)}.")
        return self

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
    def _tau_is_a_share(self) -> QuantizeConfig:
        if self.tau_kind == "quantile" and self.tau > 1:
            raise KeyProblem("tau", f"is a share of the scales under tau_kind quantile: at most 1, found {self.tau:g}.")
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
