"""The quantize stage: learned step sizes, trained flat, with conflicting scale gradients watched and frozen.

GAQAT (arXiv 2412.05551) is `quant.ScaleConflict` in the flat engine's compose slot over SAGM's two probes; every
other method of the table is the same training with other callbacks (`stages.qat_callbacks`), another flat method or
quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from flatcompress import quant
from flatcompress.latency.device import bits_price
from flatcompress.modules import evaluating
from flatcompress.plan import Plan
from flatcompress.stages import budget, families, members, on_device, post_training, shipped
from flatcompress.stages.averaging import Averaging
from flatcompress.stages.callbacks import BiasRounding, Distillation, FrozenBatchNorm, MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.flatness import log_map
from flatcompress.stages.job import check_trainable, divided, make_job, train
from flatcompress.stages.measure import train_batches
from flatcompress.stages.qat_callbacks import Conflict, GridPull, Oscillation, Point, ScaleSteps, Transform, in_turn
from flatcompress.stages.qat_methods import conflict_mix, float_epochs
from flatcompress.stages.quantize_config import QuantizeConfig
from flatcompress.stages.stage import Facts, Phase, Stage
from flatcompress.training import layout
from flatcompress.training.callback import Callback
from flatcompress.training.job import Job

SENSITIVITY_SAMPLES = 256


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
    shipped.settle(run, config.tie_free)


def _train_float(run: RunContext, config: QuantizeConfig, facts: Facts) -> None:
    with divided(run):
        callbacks: list[Callback] = [MaskedWeights(run.model)]
        if config.freeze_bn:
            callbacks.append(FrozenBatchNorm(run.model))
        train(run, make_job(run, config, callbacks, epochs=float_epochs(config), eligible=lambda epoch: False))


def _train_quantized(run: RunContext, config: QuantizeConfig, teacher: nn.Module | None, facts: Facts) -> None:
    trained = config.epochs * len(run.data.train)
    given = post_training.calibration(run, calibration_samples(run, config))
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
        with run.part("placing the quantizers"):
            run.plan = run.plan + insert(run.model, run.example(), config, facts["bits"])
        with run.doing("calibration"), layout.lying(run.model, run.layout):
            quant.calibrate(run.model, given)
    if config.freeze_bn == "estimated" and run.resume is None:
        shipped.estimate(run, trained)
    if before is not None:
        log_map(run, before, config.epochs)
    del given, before  # as large as a batch's activations, and training is where memory is short
    with divided(run, quant.scale_parameters(run.model).values()):
        train(run, qat_job(run, config, teacher))
    if not config.freeze_bn:
        shipped.estimate(run, trained)
    shipped.settle(run, config.tie_free)


def calibration_samples(run: RunContext, config: QuantizeConfig) -> int:
    """How many samples activation scales start from: fewer than wanted where little is trained; events say so, of
    BatchNorm's statistics too. A post-training start fits weights to them as well and takes all.
    """
    wanted, there = config.calibration_samples, len(run.data.train)
    count = wanted if config.from_post_training else budget.deciding(wanted, config.epochs * there, run.batch_size)
    taken = {"calibration": (count, wanted)}
    if config.freeze_bn is not True:
        fewer, all_of_them = (shipped.statistics_samples(run, n) for n in (config.epochs * there, None))
        taken["statistics"] = fewer, all_of_them
    for what, (samples, most) in taken.items():
        if samples < min(most, there):
            run.emit("sampled", what=what, samples=samples, of_samples=min(most, there))
    return count


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
        as_shipped=_as_shipped(run, config),
        compose=in_turn(transforms),
        perturbed=point.perturbed if point is not None else not_scales(run.model, config),
    )


def callbacks(run: RunContext, config: QuantizeConfig, teacher: nn.Module | None) -> list[Callback]:
    """What takes part, in this order.

    The transforms of the combined gradient: conflict first, it compares the gradients as they come; the scales' steps
    and turns after all that mixes their gradients; the point last, it drops gradients. What moves weights and scales
    after a step (conflict, the scales' steps, CAGE, oscillation) before the masks, with the last word on zeros; the
    average after them, it sees what they hold at zero. Biases are rounded, or not, before the average is judged on the
    validation split. Terms of the loss add up in this order: dampening, then distillation.
    """
    model, method = run.model, config.row
    bloop = (1.0 if method.bloop else 0.0) if config.bloop is None else config.bloop
    point, cage = config.perturb_point or method.point, method.cage if config.cage is None else config.cage
    watched = config.oscillation_threshold is not None or config.dampen > 0
    steps, trained = (n * run.steps_per_epoch for n in (config.epochs, config.epochs - float_epochs(config)))
    return [
        *([Conflict(scale_conflict(model, config, run.seed), run.emit)] if method.conflict else []),
        *([Transform("bloop", quant.ScaleBloop(model, bloop))] if bloop > 0 else []),
        *([Transform("alternation", quant.Alternation(model))] if method.alternate else []),
        *([GridPull(quant.Cage(model, trained, cage, config.cage_silence))] if cage > 0 else []),
        *scale_course(run, config, trained),
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
    return Averaging(run, config.averaging, config.epochs, bool(config.freeze_bn), _as_shipped(run, config))


def _as_shipped(run: RunContext, config: QuantizeConfig) -> Callable[[], AbstractContextManager[None]]:
    return partial(shipped.as_shipped, run, bool(config.freeze_bn), config.epochs * len(run.data.train))


def scale_course(run: RunContext, config: QuantizeConfig, steps: int) -> list[Transform]:
    """What decides how far scales go in a step, and in which of ``steps`` they move."""
    found: list[Transform] = []
    if config.scale_steps == "relative":
        found.append(ScaleSteps(quant.RelativeSteps(run.model)))
    if config.scale_warmup or config.scale_stop < 1 or config.scale_turns:
        turns = quant.ScaleTurns(run.model, steps, config.scale_warmup, config.scale_stop, config.scale_turns)
        found.append(Transform("scale_turns", turns))
    return found


def scale_conflict(model: nn.Module, config: QuantizeConfig, seed: int = 0) -> quant.ScaleConflict:
    """GAQAT's watch over the scales' two gradients, as the recipe has it."""
    keys = {"K", "tau", "tau_kind", "mode", "freeze_target", "granularity", "refreeze", "remedy"}
    return quant.ScaleConflict(model, **config.model_dump(include=keys), mix=conflict_mix(config), seed=seed)


def not_scales(model: nn.Module, config: QuantizeConfig) -> Callable[[str, nn.Parameter], bool]:
    """Which parameters move with the perturbation: all but the quantizers' scales, unless the recipe wants them too."""
    scales = {id(p) for p in quant.scale_parameters(model).values()}
    return lambda name, parameter: config.perturb_scales or id(parameter) not in scales


def dry_run(model: nn.Module, example: Tensor, config: QuantizeConfig) -> None:
    """Insert the quantizers into a copy: tracing, names and patterns are checked before anything runs."""
    if float_epochs(config):  # learned scales come with the quantizers
        check_trainable(model)
    on_device.check(model, example, config, placement(config))
    insert(model, example, config, None if config.bits == "auto" else config.bits)
    if config.scale_steps == "relative" and config.epochs:
        quant.RelativeSteps(model)


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
    on_device.check(run.model, run.example(), config, placement(config))  # of channels as they are by now
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
            price=bits_price(run.model, run.example(), **placement(config)) if unit == "flash" else None,
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
