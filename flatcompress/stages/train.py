"""The train stage, and the piece of it that every stage that trains shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from flatcompress import flat
from flatcompress.prune import masks
from flatcompress.stages.configs import TrainConfig, TrainingKeys
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, accuracy, fit, make_base_optimizer, restore_best


def parameter_groups(
    model: nn.Module, weight_decay: float, scales: Iterable[nn.Parameter] = (), scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Matrices and filters decay, vectors (biases, norms) do not; neither do quantizer ``scales``, at ``scale_lr``."""
    own = {id(p) for p in scales}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1 and id(p) not in own], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1 and id(p) not in own], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in own], "weight_decay": 0.0},
    ]
    if scale_lr is not None:
        groups[2]["lr"] = scale_lr
    return [g for g in groups if g["params"]]


def make_job(
    work: Workpiece,
    config: TrainingKeys,
    *,
    epochs: int | None = None,
    first_epoch: int = 0,
    scales: Iterable[nn.Parameter] = (),
    scale_lr: float | None = None,
    extra: Iterable[Tensor] = (),
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    method: str | None = None,
    hyper: dict[str, Any] | None = None,
    **plugs: Any,
) -> Job:
    """A training job for ``work.model`` under ``config``; ``plugs`` go to the flat engine's slots.

    ``extra``: tensors beside the model's parameters that the optimizer must know.
    Weights that carry a mask stay exactly zero: their gradients are zeroed in every pass, their values after a step.
    """
    accelerator = work.accelerator
    model = accelerator.prepare(work.model)
    o = config.optimizer
    groups = parameter_groups(model, o.weight_decay, scales, scale_lr)
    further = list(extra)
    if further:
        groups.append({"params": further, "weight_decay": 0.0})
    base = make_base_optimizer(groups, o.name, o.lr, o.weight_decay, o.momentum, o.nesterov, o.betas)
    optimizer = flat.create(
        method or config.flat_method(),
        model,
        base,
        scaler=accelerator.scaler,
        max_grad_norm=config.max_grad_norm,
        **(config.hyper if hyper is None else hyper),
        **plugs,
    )
    return Job(
        model=model,
        optimizer=optimizer,
        train=work.data.train,
        accelerator=accelerator,
        loss=loss or nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        epochs=epochs or config.epochs,
        first_epoch=first_epoch,
        schedule_epochs=config.epochs,
        batch_size=work.batch_size,
        workers=work.workers,
        seed=work.seed,
        schedule=config.schedule,
        select=config.select,
        validate=lambda: accuracy(model, work.data.val, accelerator.device),
        emit=work.emit,
        progress=work.progress,
        resume=work.resume,
        after_backward=lambda: masks.mask_gradients_(work.model),
        after_step=lambda step: masks.enforce_(work.model),
    )


def also_after_step(job: Job, function: Callable[[int], None]) -> None:
    """Run ``function`` after each step, before what the job does there already (holding masks, say)."""
    job.after_step = in_turn(function, job.after_step)


def in_turn(first: Callable[[int], None], second: Callable[[int], None]) -> Callable[[int], None]:
    """A hook of the loop that runs both, with the same step or epoch."""

    def both(number: int) -> None:
        first(number)
        second(number)

    return both


def finish(work: Workpiece, job: Job) -> int:
    """Take the trained module out of its wrappers; returns the forward + backward passes that it took."""
    work.model = job.accelerator.unwrap_model(job.model, keep_fp32_wrapper=False)
    if job.accelerator.num_processes > 1:  # running statistics are each process's own until now
        broadcast(list(work.model.buffers()))
    job.accelerator.free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return int(getattr(job.optimizer, "passes", 0))


def run(work: Workpiece, config: TrainConfig) -> Workpiece:
    """Train ``work.model`` with the flat method of ``config``; the plan stays as it is."""
    from flatcompress.stages.averaging import Averaging

    job = make_job(work, config)
    averaging = Averaging(work, job, config) if config.averaging != "none" else None
    fit(job)
    if averaging is not None:
        averaging.finish()
    else:
        restore_best(job)
    work.passes += finish(work, job)
    return work
