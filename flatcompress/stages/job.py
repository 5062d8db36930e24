"""The training job of a stage: built once from the stage's keys and its callbacks, run, and taken apart again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from flatcompress import flat, quant
from flatcompress.environment import give_back_memory
from flatcompress.errors import UserError
from flatcompress.sharded import is_divided
from flatcompress.stages.averaging import Averaging
from flatcompress.stages.callbacks import Heartbeat
from flatcompress.stages.context import RunContext
from flatcompress.stages.keys import TrainingKeys
from flatcompress.training import fsdp, layout, optimizers
from flatcompress.training.callback import Callback
from flatcompress.training.compiling import compiled, eager
from flatcompress.training.job import Job
from flatcompress.training.loop import fit, restore_best


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


def check_trainable(model: nn.Module) -> None:
    """UserError when no parameter of the float model may move."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("every parameter of the model is frozen (requires_grad is False): there is nothing to train.")


def make_job(
    run: RunContext,
    config: TrainingKeys,
    callbacks: Sequence[Callback],
    *,
    epochs: int | None = None,
    first_epoch: int = 0,
    eligible: Callable[[int], bool] = lambda epoch: True,
    scales: Iterable[nn.Parameter] = (),
    scale_lr: float | None = None,
    extra: Iterable[Tensor] = (),
    hyper: dict[str, Any] | None = None,
    as_shipped: Callable[[], AbstractContextManager[None]] = nullcontext,
    **slots: Any,
) -> Job:
    """A training job for ``run.model`` under ``config``; ``slots`` are the flat engine's (radius, compose, perturbed).

    ``extra``: tensors beside the model's parameters that the optimizer must know. ``as_shipped``: inside it the model
    is what the stage would hand on if the epoch were selected; every epoch is judged there.
    """
    model = _prepared(run)
    groups = parameter_groups(model, config.optimizer.weight_decay, scales, scale_lr)
    groups += [{"params": further, "weight_decay": 0.0}] if (further := list(extra)) else []
    optimizer = flat.create(
        config.flat_method(),
        model,
        optimizers.build(groups, *config.optimizer.arguments),
        scaler=run.accelerator.scaler,
        max_grad_norm=config.max_grad_norm,
        perturb=config.perturb,
        **(config.hyper if hyper is None else hyper),
        **slots,
    )
    return Job(
        model=model,
        optimizer=optimizer,
        selects=optimizer.method.selects,
        train=run.data.train,
        accelerator=run.accelerator,
        loss=run.task.training_loss(config.label_smoothing),
        task=run.task,
        epochs=epochs or config.epochs,
        first_epoch=first_epoch,
        schedule_epochs=config.epochs,
        **_batching(run),
        max_steps=config.max_steps,
        workers=run.workers,
        seed=run.seed,
        schedule=config.schedule,
        select=config.select,
        patience=config.patience,
        validate=partial(_score, run, model, as_shipped),
        callbacks=[_heartbeat(run, config), *callbacks, *run.callbacks],
        eligible=eligible,
        emit=run.emit,
        progress=run.progress,
        resume=run.resume,
        context=run.phase,
    )


def _prepared(run: RunContext) -> nn.Module:
    """The model as the processes train it together."""
    if is_divided(run.model):
        return run.model
    layout.put(run.model, run.layout)
    prepared: nn.Module = run.accelerator.prepare(run.model)
    return prepared


def _batching(run: RunContext) -> dict[str, Any]:
    """What an optimizer step of the running stage is made of."""
    size = run.batch_size * run.accumulate
    return {
        "batch_size": size,
        "memory_format": run.layout,
        "accumulate": run.accumulate,
        "balanced": run.balanced,
        "mixing": run.mixing,
    }


def _heartbeat(run: RunContext, config: TrainingKeys) -> Heartbeat:
    return Heartbeat(run.show, min(config.epochs * run.steps_per_epoch, config.max_steps or sys.maxsize))


def _score(run: RunContext, model: nn.Module, as_shipped: Callable[[], AbstractContextManager[None]]) -> float:
    """The metric that selects, on the validation split."""
    with eager(model), as_shipped(), run.part("validation"), quant.held(model):
        return run.evaluate(model, run.data.val)[run.task.selects]


@contextmanager
def divided(run: RunContext, scales: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, the weights of ``run.model`` are divided over the processes where the recipe wants it, then whole again.

    The job and its callbacks are made inside: they see the parameters that are trained. Quantizers' ``scales`` stay
    whole: they are few, and looked at outside of the network's forward.
    """
    if not run.divides:
        yield
        return
    shell = fsdp.divide(run.model, scales)
    yield
    run.model = fsdp.gather(run.model, shell)


def train(run: RunContext, job: Job) -> None:
    """Run the job; ``run.model`` is then the trained module, at its average or at the epoch that was selected."""
    give_back_memory()  # what came before was of other shapes; after it training has its own
    with compiled(job.model) if run.compiles else nullcontext():
        fit(job)
    averages = [callback for callback in job.callbacks if isinstance(callback, Averaging)]
    for average in averages:
        average.finish()
    if not averages:
        restore_best(job)
    run.model = job.accelerator.unwrap_model(job.model, keep_fp32_wrapper=False)
    if not is_divided(run.model):
        layout.put(run.model, "contiguous")  # surgery, packing and checkpoints begin with what is there
    if job.accelerator.num_processes > 1:  # running statistics are each process's own until now
        broadcast(list(run.model.buffers()))
    job.accelerator.free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    run.passes += job.optimizer.passes
