"""The quantize stage: learned step sizes, trained flat, with conflicting scale gradients watched and frozen.

GAQAT (arXiv 2412.05551) is `quant.ScaleConflict` in the flat engine's compose slot over SAGM's two probes; every
other method of the table is the same loop with other plugs (`stages.qat_plugs`), another flat method or quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import quant
from flatcompress.modules import evaluating
from flatcompress.plan import Plan
from flatcompress.stages.averaging import Averaging
from flatcompress.stages.configs import QuantizeConfig
from flatcompress.stages.flatness import log_map
from flatcompress.stages.measure import train_batches
from flatcompress.stages.methods import QAT_METHODS, QatMethod
from flatcompress.stages.qat_plugs import Plugs
from flatcompress.stages.train import also_after_step, finish, in_turn, make_job
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, fit, restore_best

CALIBRATION_SAMPLES = 512
SENSITIVITY_SAMPLES = 256


def run(work: Workpiece, config: QuantizeConfig) -> Workpiece:
    """Quantize ``work.model`` and train it; the plan gains the quantizers."""
    teacher = copy.deepcopy(work.model).eval().requires_grad_(False) if config.distill else None
    if work.resume is not None and work.resume["context"].get("phase") == "quantized":
        context = work.resume["context"]
    else:
        passes = _train_float(work, config)
        context = {"phase": "quantized", "passes": passes, "bits": choose_bits(work, config)}
    _train_quantized(work, config, teacher, context)
    return work


def rehearse(model: nn.Module, example: Tensor, config: QuantizeConfig) -> None:
    """Insert the quantizers into a copy: tracing, names and patterns are checked before anything runs."""
    insert(model, example, config, None if config.bits == "auto" else config.bits)


def insert(model: nn.Module, example: Tensor, config: QuantizeConfig, bits: dict[str, Any] | None = None) -> Plan:
    """Quantizers where ``config`` wants them, in place; ``bits`` per layer or pattern."""
    return quant.quantize(
        model, config.weight_bits, method=config.quantizer, per_channel=config.per_channel, bits=bits,
        **placement(config), example_input=example,
    )  # fmt: skip


def placement(config: QuantizeConfig) -> dict[str, Any]:
    """What decides where quantizers sit, beside the bits of single layers."""
    return {
        "activation_bits": config.activation_bits,
        "first_last_bits": config.first_last_bits,
        "input_bits": config.input_bits,
        "residual_bits": config.residual_bits,
        "ignore": config.ignore,
    }


def choose_bits(work: Workpiece, config: QuantizeConfig) -> dict[str, Any] | None:
    """Bits per layer: as the recipe says, or by sensitivity on training data within the budget (arXiv 1911.03852)."""
    if config.bits != "auto":
        return config.bits
    unit, budget = config.bits_budget
    x, y = train_batches(work, SENSITIVITY_SAMPLES, SENSITIVITY_SAMPLES)[0]
    with evaluating(work.model):
        chosen = quant.auto_bits(
            work.model,
            lambda: nn.functional.cross_entropy(work.model(x), y),
            budget,
            unit,
            example_input=work.example(),
            kind=config.sensitivity,
            seed=work.seed,
            **placement(config),
        )
    work.emit("bits", unit=unit, budget=budget, bits=chosen)
    return chosen


def float_epochs(config: QuantizeConfig) -> int:
    """Epochs before the quantizers come in; at least one is left after them."""
    share = method_of(config).float_share if config.quant_start is None else config.quant_start
    return min(round(share * config.epochs), config.epochs - 1)


def method_of(config: QuantizeConfig) -> QatMethod:
    """The row that ``config`` names."""
    return QAT_METHODS[config.method].make()


def _train_float(work: Workpiece, config: QuantizeConfig) -> int:
    """The float warm-up; returns the passes it took."""
    epochs = float_epochs(config)
    if not epochs:
        return 0
    job = make_job(work, config, epochs=epochs)
    job.context = {"phase": "float"}
    job.eligible = lambda epoch: False
    if config.freeze_bn:
        hold_statistics(job)
    fit(job)
    work.resume = None
    return finish(work, job)


def _train_quantized(
    work: Workpiece, config: QuantizeConfig, teacher: nn.Module | None, context: dict[str, Any]
) -> None:
    before = copy.deepcopy(work.model) if config.flatness_map and work.resume is None else None
    work.plan = work.plan + insert(work.model, work.example(), config, context["bits"])
    if before is not None:
        log_map(work, before)
    quant.calibrate(work.model, [x for x, _ in train_batches(work, CALIBRATION_SAMPLES)])
    plugs = Plugs(work.model, config, method_of(config))
    job = qat_job(work, config, teacher, plugs)
    job.context = context
    averaging = Averaging(work, job, config) if config.averaging != "none" else None
    fit(job)
    if averaging is not None:
        averaging.finish()
    else:
        restore_best(job)
    plugs.release()
    work.passes += int(context["passes"]) + finish(work, job)
    if not config.freeze_bn:
        quant.reestimate_batchnorm(work.model, [x for x, _ in train_batches(work, 10 * work.batch_size)])
    quant.set_bias_rounding(work.model, True)


def qat_job(work: Workpiece, config: QuantizeConfig, teacher: nn.Module | None, plugs: Plugs) -> Job:
    """The training job with its plugs, distillation and rounded biases."""
    first = float_epochs(config)
    job = make_job(
        work,
        config,
        epochs=config.epochs - first,
        first_epoch=first,
        scales=quant.scale_parameters(work.model).values(),
        scale_lr=config.optimizer.lr * config.scale_lr,
        extra=plugs.extra,
        compose=plugs.compose,
        perturbed=plugs.perturbed,
    )
    steps = config.epochs * job.steps_per_epoch
    job.hooks |= plugs.hooks
    also_after_step(job, lambda step: plugs.after_step(step / steps))
    if plugs.conflict is not None:
        also_after_step(job, lambda step: log_conflict(work, plugs.conflict, step))
    masked = job.after_backward

    def after_backward() -> None:
        masked()
        plugs.after_backward()

    job.after_backward = after_backward
    job.loss = plugs.loss(job.loss)
    if teacher is not None:
        distill(job, teacher, config.distill)
    round_biases(work, job, config)
    if config.freeze_bn:
        hold_statistics(job)
    return job


def log_conflict(work: Workpiece, conflict: Any, step: int) -> None:
    """One event per finished window."""
    if conflict.t and conflict.t % conflict.K == 0:
        work.emit("conflict", step=step, quantizers=conflict.timeline())


def round_biases(work: Workpiece, job: Job, config: QuantizeConfig) -> None:
    """In the last epochs the forward rounds folded biases as the exported file does."""
    first = config.epochs - config.bias_rounding_epochs

    def before_epoch(epoch: int) -> None:
        quant.set_bias_rounding(work.model, epoch >= first)

    def after_epoch(epoch: int) -> None:
        quant.set_bias_rounding(work.model, epoch + 1 >= first)

    job.before_epoch, job.after_epoch = before_epoch, after_epoch


def hold_statistics(job: Job) -> None:
    """BatchNorm normalises by its running statistics from each epoch's first batch on, and leaves them as they are."""

    def hold(epoch: int) -> None:
        for module in job.raw_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    job.before_epoch = in_turn(job.before_epoch, hold)


def distill(job: Job, teacher: nn.Module, weight: float) -> None:
    """Add ``weight`` times the distillation loss to the job's loss; the teacher reads the batch the model reads."""
    task: Callable[[Tensor, Tensor], Tensor] = job.loss
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and seen.get("input") is not inputs[0]:
            seen["input"] = inputs[0]
            with torch.no_grad():
                seen["logits"] = teacher(inputs[0])

    job.raw_model.register_forward_pre_hook(remember)
    job.loss = lambda logits, y: task(logits, y) + weight * quant.distillation_loss(logits, seen["logits"])
