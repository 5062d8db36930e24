"""The keys of the quantize stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flatcompress import quant
from flatcompress.errors import unknown
from flatcompress.stages import post_training
from flatcompress.stages.keys import (
    AveragingKind,
    Bits,
    KeyProblem,
    NonNegative,
    Positive,
    Size,
    TrainingKeys,
    known_flat_method,
    known_method,
)
from flatcompress.stages.qat_methods import QAT_METHODS, QatMethod, conflict_mix

BITS_BUDGETS = ("effective_bits", "bytes", "bops", "flash")
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class QuantizeConfig(TrainingKeys):
    """Quantization-aware training with learned step sizes, plain or under a flat method with rules for scales."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = Field(
        10, description="passes over the training split; 0: post-training quantization, nothing is trained"
    )
    method: str = Field("lsq", description="QAT method; see `flatcompress list qat-methods`")
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
    flash: Size | None = Field(
        None, description="bits: auto, budget: bytes of flash of the C on a Cortex-M4, code and all (32k)"
    )
    ram: Size | None = Field(None, description="bytes that the C's arena may take (8k), checked before training")
    sensitivity: Literal["measured", "hessian", "gradient"] = Field(
        "measured", description="bits: auto, a layer's cost: measured, by Hessian trace, or by one backward pass"
    )
    first_last_bits: Bits = Field(8, description="bits of the first and the last layer's weights")
    input_bits: Bits = Field(8, description="bits of the network's input")
    residual_bits: Bits = Field(8, description="bits of signed tensors that feed a residual add")
    per_channel: bool = Field(True, description="one weight scale per output channel")
    symmetric: bool = Field(False, description="activations that fit int8 with zero point 0, as TensorRT wants them")
    quantizer: str = Field("lsq", description="quantizer; see `flatcompress list quantizers`")
    flat: str | None = Field(None, description="flat method during QAT, in place of the QAT method's own")
    ignore: list[str] = Field(default_factory=list, description="layers that stay float: names or re:PATTERN")
    max_float_macs: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the MACs of convolutions and linear layers that may stay float unnamed"
    )
    K: Annotated[int, Field(ge=2)] = Field(50, description="GAQAT: steps per disorder window")
    tau: NonNegative = Field(0.3, description="GAQAT: freeze below this disorder")
    tau_kind: Literal["absolute", "quantile", "sigma"] = Field("quantile", description="GAQAT: how tau is read")
    mode: Literal["paper", "gated", "opposed", "standing", "random"] = Field(
        "paper",
        description="GAQAT: freeze on order alone, on order with lasting opposition, on opposition alone, on order "
        "of a scale that stands where it is, or at random (a control: any share tau, drawn anew for every window)",
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
    scale_steps: Literal["absolute", "relative"] = Field(
        "absolute", description="relative: the optimizer trains a scale's logarithm, so steps are shares of its size"
    )
    scale_warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the steps, at first, in which quantizer scales alone move"
    )
    scale_stop: Share = Field(1.0, description="share of the steps after which quantizer scales stand still; 0: always")
    scale_turns: Annotated[int, Field(ge=0)] = Field(
        0, description="weights and quantizer scales move by turns of so many steps; 0: both in every step"
    )
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
    cage: NonNegative | None = Field(
        None, description="CAGE's pull of the weights to their grid; default: the method's"
    )
    cage_silence: Annotated[float, Field(ge=0, lt=1)] = Field(0.5, description="share of the training before that pull")
    dampen: NonNegative = Field(0.0, description="weight, at the end, of a loss that draws weights to their grid")
    oscillation_threshold: Positive | None = Field(
        None, description="freeze weights that change sides more often than this, at the end (0.01); default: off"
    )
    distill: NonNegative = Field(0.0, description="weight of distillation from the float model")
    averaging: AveragingKind = Field("none", description="average the weights and scales over steps")
    freeze_bn: bool | Literal["estimated"] = Field(
        False, description="BatchNorm keeps the float network's statistics, or those estimated once before the training"
    )
    flatness_map: bool = Field(
        True, description="log how far each layer may move (Hessian trace) against how far its grid moves it"
    )
    sharpness: bool | None = Field(
        None, description="measure how flat the minimum is, as a whole and by layer (default: after training)"
    )
    start: Literal["lsq", "post_training"] | None = Field(
        None, description="where scales and weights begin: LSQ's start, or post-training (default: with epochs 0)"
    )
    calibration_samples: Annotated[int, Field(ge=1)] = Field(
        post_training.CALIBRATION_SAMPLES,
        description="training samples that scales and ranges are taken from, at most; "
        "of a training so short that these would cost more than an eighth of it, fewer",
    )
    scaling: str = Field("none", description="post-training: what moves between layers; `flatcompress list scalings`")
    weight_scale: str = Field("mse", description="post-training: weight scales; `flatcompress list weight-scales`")
    calibrator: str = Field("mse", description="post-training: activation ranges; `flatcompress list calibrators`")
    rounding: str = Field("nearest", description="post-training: rounding of weights; `flatcompress list roundings`")
    correction: str = Field("bias", description="post-training: what is put right; `flatcompress list corrections`")
    max_drop: NonNegative | None = Field(
        None, description="epochs 0: give layers bits back until validation accuracy falls by at most so many points"
    )
    bias_rounding_epochs: Annotated[int, Field(ge=0)] = Field(
        1, description="last epochs that train with the exported file's rounded biases"
    )
    tie_free: bool = Field(True, description="move scales by under 0.1 % at the end: all runtimes round alike")

    @property
    def label(self) -> str:
        return self.method if self.epochs else "post-training"

    @property
    def measures_sharpness(self) -> bool:
        """Whether the ledger's row has sharpness: many passes, which would take most of a run that does not train."""
        return bool(self.epochs) if self.sharpness is None else self.sharpness

    @property
    def row(self) -> QatMethod:
        """The QAT method's row."""
        return QAT_METHODS[known_method(self.method, QAT_METHODS, "QAT method")]()

    def flat_method(self) -> str:
        return self.row.flat if self.flat is None else known_flat_method(self.flat, "flat")

    @property
    def needs_whole(self) -> str | None:
        if not self.epochs:
            return None  # nothing is trained
        inside = {
            "perturb_point: quantized": (self.perturb_point or self.row.point) == "quantized",
            "cage": bool(self.row.cage if self.cage is None else self.cage),
            "dampen": self.dampen > 0,
            "oscillation_threshold": self.oscillation_threshold is not None,
        }
        found = [key for key, given in inside.items() if given]
        return f"{found[0]} works on weights outside of the network's forward" if found else self.climbs_alone

    @property
    def from_post_training(self) -> bool:
        """Whether post-training quantization is done, alone or before the training."""
        return self.start == "post_training" or not self.epochs

    @model_validator(mode="after")
    def _fits_post_training(self) -> QuantizeConfig:
        for key, table in post_training.TABLES.items():
            if getattr(self, key) not in table:
                raise KeyProblem(key, str(unknown(table.kind, getattr(self, key), table)))
            # the recipe of a run folder has every default written out
            if getattr(self, key) != type(self).model_fields[key].default and not self.from_post_training:
                raise KeyProblem(key, "belongs to post-training quantization: epochs: 0, or start: post_training.")
        if self.start == "lsq" and not self.epochs:
            raise KeyProblem("start", "LSQ's start is made for training and loses points without: leave it out.")
        if self.max_drop is not None and self.epochs:
            raise KeyProblem("max_drop", "goes with epochs: 0.")
        return self

    @property
    def bits_budget(self) -> tuple[str, float]:
        """(unit, value) of the budget that ``bits: auto`` keeps."""
        given = [(unit, v) for unit in BITS_BUDGETS if (v := getattr(self, unit)) is not None]
        return given[0] if given else ("effective_bits", float(self.weight_bits))

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
        method = self.row
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
        if method.conflict:
            conflict_mix(self)
        if self.perturb_scales and (self.perturb_point or method.point) == "quantized":
            raise KeyProblem(
                "perturb_scales", "not with a perturbation after the quantizer, which leaves scales alone."
            )
        return self

    @model_validator(mode="after")
    def _scales_move(self) -> QuantizeConfig:
        if 0 < self.scale_stop <= self.scale_warmup:
            raise KeyProblem("scale_stop", f"must lie after scale_warmup ({self.scale_warmup:g}), or be 0.")
        for key, idle in (("scale_warmup", 0.0), ("scale_turns", 0)):
            if not self.scale_stop and getattr(self, key) != idle:
                raise KeyProblem(key, "needs scales that move: not with scale_stop: 0.")
        if self.scale_turns and self.row.alternate:
            raise KeyProblem("scale_turns", f"method {self.method!r} takes turns of one step itself.")
        return self

    @model_validator(mode="after")
    def _tau_is_a_share(self) -> QuantizeConfig:
        if self.mode == "random" and self.tau_kind != "quantile":
            raise KeyProblem("tau_kind", "mode: random freezes the share tau of the scales: quantile.")
        if self.tau_kind == "quantile" and self.tau > 1:
            raise KeyProblem("tau", f"is a share of the scales under tau_kind quantile: at most 1, found {self.tau:g}.")
        return self

    @model_validator(mode="after")
    def _known_quantizer(self) -> QuantizeConfig:
        if self.quantizer not in quant.QUANTIZERS:
            raise KeyProblem("quantizer", str(unknown("quantizer", self.quantizer, quant.QUANTIZERS)))
        if self.symmetric and quant.QUANTIZERS[self.quantizer].facts.zero_point:
            raise KeyProblem("symmetric", f"quantizer {self.quantizer!r} has zero points: take quantizer: lsq.")
        return self
