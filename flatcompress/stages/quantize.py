"""The quantize stage: learned step sizes, trained flat, with conflicting scale gradients watched and frozen.

GAQAT (arXiv 2412.05551) is `quant.ScaleConflict` in the flat engine's compose slot over SAGM's two probes; every
other method of the table is the same training with other callbacks (`stages.qat_callbacks`), another flat method or
quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from flatcompress import quant
from flatcompress.errors import unknown
from flatcompress.modules import evaluating
from flatcompress.plan import Plan
from flatcompress.stages import families, members, post_training, shipped
from flatcompress.stages.averaging import Averaging
from flatcompress.stages.callbacks import BiasRounding, Distillation, FrozenBatchNorm, MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.flatness import log_map
from flatcompress.stages.job import check_trainable, make_job, train
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
from flatcompress.stages.measure import train_batches
from flatcompress.stages.qat_callbacks import Conflict, GridPull, Oscillation, Point, Transform, in_turn
from flatcompress.stages.qat_methods import QAT_METHODS, QatMethod, conflict_mix, float_epochs
from flatcompress.stages.stage import Facts, Phase, Stage
from flatcompress.training.callback import Callback
from flatcompress.training.job import Job

SENSITIVITY_SAMPLES = 256
BITS_BUDGETS = ("effective_bits", "bytes", "bops")


class QuantizeConfig(TrainingKeys):
    """Quantization-aware training with learned step sizes, and GAQAT's freezing of conflicting scale gradients."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = Field(
        10, description="passes over the training split; 0: post-training quantization, nothing is trained"
    )
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
        post_training.CALIBRATION_SAMPLES, description="training samples that scales and ranges are taken from"
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
    def _tau_is_a_share(self) -> QuantizeConfig:
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


def phases(run: RunContext, config: QuantizeConfig) -> list[Phase]:
    """A float warm-up where the method has one, then the bits of every layer, then training with the quantizers."""
    teacher = copy.deepcopy(run.model).eval().requires_grad_(False) if config.distill else None
    warm_up = [Phase("float", partial(_train_float, run, config))] if float_epochs(config) else []
    return [
        *warm_up,
        Phase("bits", lambda facts: {"bits": choose_bits(run, config)}),
        Phase("quantized", partial(_train_quantized, run, config, teacher))
        if config.epochs
        else Phase("post_training", partial(_post_training, run, config)),
    ]


def _post_training(run: RunContext, config: QuantizeConfig, facts: Facts) -> None:
    images = post_training.calibration(run, config.calibration_samples)
    settings = post_training.settings(run, config, {**placement(config), "bits": facts["bits"]})
    with run.doing("post-training quantization"):
        post_training.quantize(run, images, config.weight_bits, settings, config.max_drop)


def _train_float(run: RunContext, config: QuantizeConfig, facts: Facts) -> None:
    callbacks: list[Callback] = [MaskedWeights(run.model)]
    if config.freeze_bn:
        callbacks.append(FrozenBatchNorm(run.model))
    train(run, make_job(run, config, callbacks, epochs=float_epochs(config), eligible=lambda epoch: False))


def _train_quantized(run: RunContext, config: QuantizeConfig, teacher: nn.Module | None, facts: Facts) -> None:
    given = post_training.calibration(run, config.calibration_samples)
    if members.family_of(run) is not None:
        families.quantize(run, config, partial(insert, example=run.example(), config=config, bits=facts["bits"]), given)
        return
    mapped = config.flatness_map and run.measuring != "off" and run.resume is None
    before = copy.deepcopy(run.model) if mapped else None
    if config.from_post_training and run.resume is None:
        settings = post_training.settings(run, config, {**placement(config), "bits": facts["bits"]})
        with run.doing("post-training quantization"):
            post_training.start(run, given, config.weight_bits, settings)
    else:
        run.plan = run.plan + insert(run.model, run.example(), config, facts["bits"])
        with run.doing("calibration"):
            quant.calibrate(run.model, given)
    if config.freeze_bn == "estimated" and run.resume is None:
        shipped.estimate(run)
    if before is not None:
        log_map(run, before, config.epochs)
    train(run, qat_job(run, config, teacher))
    if not config.freeze_bn:
        shipped.estimate(run)
    quant.set_bias_rounding(run.model, True)


def qat_job(run: RunContext, config: QuantizeConfig, teacher: nn.Module | None) -> Job:
    """The training of the quantized ``run.model``; ``teacher``: what it is distilled from, if anything."""
    found = callbacks(run, config, teacher)
    transforms = [callback for callback in found if isinstance(callback, Transform)]
    point = next((callback for callback in found if isinstance(callback, Point)), None)
    first = float_epochs(config)
    return make_job(
        run,
        config,
        found,
        epochs=config.epochs - first,
        first_epoch=first,
        scales=quant.scale_parameters(run.model).values(),
        scale_lr=config.optimizer.lr * config.scale_lr,
        extra=point.offsets if point is not None else (),
        as_shipped=partial(shipped.as_shipped, run, bool(config.freeze_bn)),
        compose=in_turn(transforms),
        perturbed=point.perturbed if point is not None else not_scales(run.model, config),
    )


def callbacks(run: RunContext, config: QuantizeConfig, teacher: nn.Module | None) -> list[Callback]:
    """What takes part, in this order.

    The transforms of the combined gradient: conflict first, it compares the gradients as they come; the point last, it
    drops gradients. What moves weights and scales after a step (conflict, CAGE, oscillation) before the masks, with the
    last word on zeros; the average after them, it sees what they hold at zero. Biases are rounded, or not, before the
    average is judged on the validation split. Terms of the loss add up in this order: dampening, then distillation.
    """
    model, method = run.model, config.row
    bloop = (1.0 if method.bloop else 0.0) if config.bloop is None else config.bloop
    point, cage = config.perturb_point or method.point, method.cage if config.cage is None else config.cage
    watched = config.oscillation_threshold is not None or config.dampen > 0
    steps, trained = (n * run.steps_per_epoch for n in (config.epochs, config.epochs - float_epochs(config)))
    return [
        *([Conflict(scale_conflict(model, config), run.emit)] if method.conflict else []),
        *([Transform("bloop", quant.ScaleBloop(model, bloop))] if bloop > 0 else []),
        *([Transform("alternation", quant.Alternation(model))] if method.alternate else []),
        *([GridPull(quant.Cage(model, trained, cage, config.cage_silence))] if cage > 0 else []),
        *([Point(model)] if point == "quantized" else []),
        *([Oscillation(model, config.oscillation_threshold, config.dampen, steps)] if watched else []),
        MaskedWeights(model),
        *([Distillation(teacher, config.distill, run.task)] if teacher is not None else []),
        BiasRounding(model, config.epochs - config.bias_rounding_epochs),
        *([FrozenBatchNorm(model)] if config.freeze_bn else []),
        *([average(run, config)] if config.averaging != "none" else []),
    ]


def average(run: RunContext, config: QuantizeConfig) -> Averaging:
    """The average of weights and scales that takes the place of the best epoch."""
    judged = partial(shipped.as_shipped, run, bool(config.freeze_bn))
    return Averaging(run, config.averaging, config.epochs, bool(config.freeze_bn), judged)


def scale_conflict(model: nn.Module, config: QuantizeConfig) -> quant.ScaleConflict:
    """GAQAT's watch over the scales' two gradients, as the recipe has it."""
    keys = {"K", "tau", "tau_kind", "mode", "freeze_target", "granularity", "refreeze", "remedy"}
    return quant.ScaleConflict(model, **config.model_dump(include=keys), mix=conflict_mix(config))


def not_scales(model: nn.Module, config: QuantizeConfig) -> Callable[[str, nn.Parameter], bool]:
    """Which parameters move with the perturbation: all but the quantizers' scales, unless the recipe wants them too."""
    scales = {id(p) for p in quant.scale_parameters(model).values()}
    return lambda name, parameter: config.perturb_scales or id(parameter) not in scales


def dry_run(model: nn.Module, example: Tensor, config: QuantizeConfig) -> None:
    """Insert the quantizers into a copy: tracing, names and patterns are checked before anything runs."""
    if float_epochs(config):  # learned scales come with the quantizers
        check_trainable(model)
    insert(model, example, config, None if config.bits == "auto" else config.bits)


def insert(model: nn.Module, example: Tensor, config: QuantizeConfig, bits: dict[str, Any] | None = None) -> Plan:
    """Quantizers where ``config`` wants them, in place; ``bits`` per layer or pattern."""
    return quant.quantize(
        model, config.weight_bits, method=config.quantizer, per_channel=config.per_channel, bits=bits,
        max_float_macs=config.max_float_macs,
        **placement(config), example_input=example,
    )  # fmt: skip


def placement(config: QuantizeConfig) -> dict[str, Any]:
    """What decides where quantizers sit, beside the bits of single layers."""
    keys = {"activation_bits", "first_last_bits", "input_bits", "residual_bits", "symmetric", "ignore"}
    return config.model_dump(include=keys)


def choose_bits(run: RunContext, config: QuantizeConfig) -> dict[str, Any] | None:
    """Bits per layer: as the recipe says, or by sensitivity on training data within the budget (arXiv 1911.03852)."""
    if config.bits != "auto":
        return config.bits
    unit, budget = config.bits_budget
    x, y = train_batches(run, SENSITIVITY_SAMPLES, SENSITIVITY_SAMPLES)[0]
    with evaluating(run.model), run.doing("the bits of each layer"):
        chosen = quant.auto_bits(
            run.model,
            lambda: run.task.loss(run.model(x), y),
            budget,
            unit,
            example_input=run.example(),
            kind=config.sensitivity,
            seed=run.seed,
            **placement(config),
        )
    run.emit("bits", unit=unit, budget=budget, bits=chosen)
    return chosen


STAGE = Stage(
    QuantizeConfig,
    phases,
    dry_run,
    refuses_after={"quantize": "the model is already quantized by an earlier stage. Quantize once."},
    fits=families.quantize_problem,
)
