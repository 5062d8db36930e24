"""The one training loop: every stage that trains goes through `fit`.

Devices, precision and processes are Accelerate's (`accelerate launch` works); the optimizer is any
`torch.optim.Optimizer` whose ``step(closure)`` runs the passes it needs, so the loop does not know which method
it is running. The order of the samples depends on (seed, stage, epoch) alone, which is what lets a run that was
stopped resume with the very same batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from flatcompress import sharded
from flatcompress.errors import Interrupted, RunError
from flatcompress.randomness import capture, restore
from flatcompress.training import divergence
from flatcompress.training.batches import Feed, epoch_batches, worker_errors
from flatcompress.training.devices import select
from flatcompress.training.divergence import Diverged
from flatcompress.training.job import Job, Recovery
from flatcompress.training.layout import laid
from flatcompress.training.schedules import rates
from flatcompress.training.steps import Means, take_step

ROLLBACK_LR = 0.5  # learning-rate factor of a rollback


def make_accelerator(device: str = "auto", precision: str = "no") -> Accelerator:
    """An Accelerator on ``device`` (auto | cpu | mps | cuda | cuda:N). UserError when that device is not there."""
    cpu = select(device) == "cpu"
    # Accelerate keeps one state per process and refuses another precision; two runs in one program may differ.
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(True)
    return Accelerator(cpu=cpu, mixed_precision=precision)


def fit(job: Job) -> None:
    """Train ``job.model`` in place; `restore_best` afterwards keeps the selected epoch.

    RunError when a value stops being finite (names step, layer and bits) and the progress has no other policy, and
    when memory runs out; Interrupted when the progress asks to stop.
    """
    base_lrs = [group["lr"] for group in job.optimizer.param_groups]
    with ExitStack() as opened:
        for callback in job.callbacks:
            callback.open(job)
            opened.callback(callback.close)
        _fit(job, base_lrs)
    for group, lr in zip(job.optimizer.param_groups, base_lrs):
        group["lr"] = lr


def _fit(job: Job, base_lrs: list[float]) -> None:
    resume, feed = job.resume, Feed(job.train, job.workers, job.accelerator.device.type == "cuda")
    if job.progress is not None and job.progress.on_divergence == "rollback" and job.resume is None:
        step = job.first_epoch * job.steps_per_epoch
        job.progress.save(step, _state(job, job.first_epoch, 0, Means(), base_lrs))
    while True:
        try:
            _run(job, feed, base_lrs, resume)
            return
        except Diverged as diverged:
            resume = _rolled_back(job, diverged)


def _run(job: Job, feed: Feed, base_lrs: list[float], resume: dict[str, Any] | None) -> None:
    epochs = job.schedule_epochs or job.epochs
    start, done, stats = _resume(job, resume)
    lr = rates(job.schedule, base_lrs, job.total_steps, job.state.recovery.lr_factor)
    if job.parts > 1:
        job.optimizer.join_chunks()
    for epoch in range(start, job.first_epoch + job.epochs):
        started = time.monotonic()
        job.model.train()
        for callback in job.callbacks:
            callback.before_epoch(epoch)
        for i, (x, y) in enumerate(_batches(job, feed, epoch, done), done):
            step = epoch * job.steps_per_epoch + i
            for group, rate in zip(job.optimizer.param_groups, lr(step)):
                group["lr"] = rate
            take_step(job, x, y, step, stats)
            for callback in job.callbacks:
                callback.after_step(step + 1)
            _save_if_due(job, epoch, i + 1, step + 1, stats, base_lrs)
        _end_epoch(job, epoch, epochs, stats, time.monotonic() - started)
        done, stats = 0, Means()
        if job.patience is not None and job.state.waited >= job.patience:
            job.emit("warning", message=f"stopped after epoch {epoch + 1}: none of {job.patience} was better")
            return


def _end_epoch(job: Job, epoch: int, epochs: int, stats: Means, seconds: float) -> None:
    for callback in job.callbacks:
        callback.after_epoch(epoch)
    value = job.validate()
    best = job.state.best
    if job.patience is not None and job.eligible(epoch):
        improved = best is None or (job.task.better(value, best[0]) and value != best[0])
        job.state.waited = 0 if improved else job.state.waited + 1
    if job.select == "best" and job.eligible(epoch) and (best is None or job.task.better(value, best[0])):
        job.state.best = (value, {k: v.detach().clone() for k, v in job.raw_model.state_dict().items()})
    job.emit(
        "epoch",
        epoch=epoch + 1,
        epochs=epochs,
        loss=stats.loss,
        **job.task.logged(stats.score, value),
        lr=job.optimizer.param_groups[0]["lr"],
        gap=stats.gap,
        passes=job.optimizer.passes,
        seconds=seconds,
    )


def _save_if_due(job: Job, epoch: int, done: int, step: int, stats: Means, base_lrs: list[float]) -> None:
    if job.progress is None:
        return
    stop = job.progress.stop_requested  # asked once: several processes agree on the answer
    due = job.progress.due(step)
    if job.divided:  # they put the state together, and their clocks differ
        due = sharded.any_process(due)
    if not stop and not due:
        return
    if divergence.parameters_finite(job.raw_model):  # else the next pass says so, and goes back
        job.progress.save(step, _state(job, epoch, done, stats, base_lrs))
    if stop:
        raise Interrupted(f"stopped after step {step}")


def _state(job: Job, epoch: int, done: int, stats: Means, base_lrs: list[float]) -> dict[str, Any]:
    state = {
        "epoch": epoch,
        "done": done,
        "stats": vars(stats),
        "base_lrs": base_lrs,
        "model": job.raw_model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "best": job.state.best,
        "waited": job.state.waited,
        "callbacks": {callback.name: callback.state_dict() for callback in job.callbacks if callback.name},
        "rng": capture(),
        "context": job.context,
        "recovery": asdict(job.state.recovery),
        **({} if job.accelerator.scaler is None else {"scaler": job.accelerator.scaler.state_dict()}),
    }
    return sharded.whole_tree(state) if job.divided else state


def _resume(job: Job, state: dict[str, Any] | None) -> tuple[int, int, Means]:
    """Take ``state`` over; returns the epoch, the batches done in it and the running means."""
    stats = Means()
    if state is None:
        return job.first_epoch, 0, stats
    try:
        sharded.load(job.raw_model, state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(job.optimizer.param_groups, state["base_lrs"]):
            group["lr"] = lr
        job.state.best = tuple(state["best"]) if state["best"] is not None else None
        job.state.waited = int(state.get("waited", 0))
        for callback in job.callbacks:
            if callback.name:
                callback.load_state_dict(state["callbacks"][callback.name])
        vars(stats).update(state["stats"])
        job.state.recovery = Recovery(**state["recovery"])
        if job.accelerator.scaler is not None:
            job.accelerator.scaler.load_state_dict(state["scaler"])
        restore(state["rng"])
        return int(state["epoch"]), int(state["done"]), stats
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise RunError(f"the saved state does not fit this stage ({reason}). Use --restart to start over.") from None


def _rolled_back(job: Job, diverged: Diverged) -> dict[str, Any]:
    """The state to resume from after a divergence, at a smaller learning rate. RunError when there is no way back."""
    progress = job.progress
    if progress is None or progress.on_divergence != "rollback":
        raise diverged
    recovery = job.state.recovery
    if recovery.rollbacks >= progress.max_rollbacks:
        raise RunError(f"{diverged}. It went back {recovery.rollbacks} times in vain. {divergence.ADVICE}")
    state = progress.last()
    if state is None or state["context"] != job.context:
        raise RunError(f"{diverged}. There is no checkpoint of this part of the stage to go back to.")
    rollbacks, factor = recovery.rollbacks + 1, recovery.lr_factor * ROLLBACK_LR
    to = state["epoch"] * job.steps_per_epoch + state["done"]
    progress.incident({**diverged.finding, "action": "rollback", "to_step": to, "lr_factor": factor})
    return {**state, "recovery": {**state["recovery"], "rollbacks": rollbacks, "lr_factor": factor}}


def restore_best(job: Job) -> None:
    """Put the best epoch's weights back; without one (nothing eligible, or select='last') nothing changes."""
    if job.state.best is not None:
        value, weights = job.state.best
        sharded.load(job.raw_model, weights)
        job.emit("selected", **job.task.selected(value))


def _batches(job: Job, feed: Feed, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    accelerator = job.accelerator
    if hasattr(job.train, "set_epoch"):
        job.train.set_epoch(epoch)
    batches = epoch_batches(
        len(job.train), job.batch_size, job.seed, epoch, accelerator.process_index, accelerator.num_processes,
        job.train.domain_ids if job.balanced else None,
    )  # fmt: skip
    with worker_errors(job.workers):
        left = batches[done : job.total_steps - epoch * job.steps_per_epoch]
        for x, y in feed.epoch(left, resumed=done > 0):
            x = laid(x.to(accelerator.device, non_blocking=True), job.memory_format)
            yield x, y.to(accelerator.device, non_blocking=True)
