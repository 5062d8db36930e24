"""The quantize stage: learned step sizes, trained flat, with conflicting scale gradients watched and frozen.

GAQAT (arXiv 2412.05551) is `quant.ScaleConflict` in the flat engine's compose slot over SAGM's two probes; every
other method of the table is the same loop with another flat method or another quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import quant
from flatcompress.plan import Plan
from flatcompress.stages.configs import QuantizeConfig
from flatcompress.stages.measure import train_batches
from flatcompress.stages.methods import QAT_METHODS
from flatcompress.stages.train import finish, make_job
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, fit, restore_best

CALIBRATION_SAMPLES = 512


def run(work: Workpiece, config: QuantizeConfig) -> Workpiece:
    """Quantize ``work.model`` and train it; the plan gains the quantizers."""
    teacher = copy.deepcopy(work.model).eval().requires_grad_(False) if config.distill else None
    work.plan = work.plan + insert(work.model, work.example(), config)
    quant.calibrate(work.model, [x for x, _ in train_batches(work, CALIBRATION_SAMPLES)])
    job = qat_job(work, config, teacher)
    fit(job)
    restore_best(job)
    work.passes += finish(work, job)
    quant.reestimate_batchnorm(work.model, [x for x, _ in train_batches(work, 10 * work.batch_size)])
    quant.set_bias_rounding(work.model, True)
    return work


def rehearse(model: nn.Module, example: Tensor, config: QuantizeConfig) -> None:
    """Insert the quantizers into a copy: tracing, names and patterns are checked before anything runs."""
    insert(model, example, config)


def insert(model: nn.Module, example: Tensor, config: QuantizeConfig) -> Plan:
    """Quantizers where ``config`` wants them, in place."""
    return quant.quantize(
        model,
        config.weight_bits,
        config.activation_bits,
        example_input=example,
        method=config.quantizer,
        first_last_bits=config.first_last_bits,
        input_bits=config.input_bits,
        residual_bits=config.residual_bits,
        per_channel=config.per_channel,
        ignore=config.ignore,
    )


def qat_job(work: Workpiece, config: QuantizeConfig, teacher: nn.Module | None) -> Job:
    """The training job with its plugs: the conflict rule, unperturbed scales, distillation, rounded biases."""
    scales = list(quant.scale_parameters(work.model).values())
    ids = {id(p) for p in scales}
    conflict = make_conflict(work, config)
    job = make_job(
        work,
        config,
        scales=scales,
        scale_lr=config.optimizer.lr * config.scale_lr,
        compose=conflict.compose if conflict is not None else None,
        perturbed=None if config.perturb_scales else lambda name, parameter: id(parameter) not in ids,
    )
    if conflict is not None:
        job.hooks["conflict"] = conflict
        job.after_step = lambda step: log_conflict(work, conflict, step)
    if teacher is not None:
        distill(job, teacher, config.distill)
    round_biases(work, job, config)
    return job


def make_conflict(work: Workpiece, config: QuantizeConfig) -> Any:
    """GAQAT's watcher, or None for a method without one."""
    if not QAT_METHODS[config.method].make().conflict:
        return None
    return quant.ScaleConflict(
        work.model,
        K=config.K,
        tau=config.tau,
        tau_kind=config.tau_kind,
        mode=config.mode,
        freeze_target=config.freeze_target,
        granularity=config.granularity,
        refreeze=config.refreeze,
    )


def log_conflict(work: Workpiece, conflict: Any, step: int) -> None:
    """One event per finished window."""
    if step % conflict.K == 0:
        work.emit("conflict", step=step, quantizers=conflict.timeline())


def round_biases(work: Workpiece, job: Job, config: QuantizeConfig) -> None:
    """In the last epochs the forward rounds folded biases as the exported file does."""
    first = config.epochs - config.bias_rounding_epochs
    quant.set_bias_rounding(work.model, first <= 0)

    def after_epoch(epoch: int) -> None:
        quant.set_bias_rounding(work.model, epoch + 1 >= first)

    job.after_epoch = after_epoch


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
