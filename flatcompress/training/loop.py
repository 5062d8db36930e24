"""The one training loop: every stage that trains goes through `fit`.

Devices, precision and processes are Accelerate's (`accelerate launch` works); the optimizer is any
`torch.optim.Optimizer` whose ``step(closure)`` runs the passes it needs, so the loop does not know which method
it is running. The order of the samples depends on (seed, stage, epoch) alone, which is what lets a run that was
stopped go on with the very same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from flatcompress.errors import Interrupted, RunError
from flatcompress.randomness import capture, restore
from flatcompress.training import divergence
from flatcompress.training.batches import accuracy, epoch_batches, loader, worker_errors
from flatcompress.training.divergence import Diverged
from flatcompress.training.schedules import lr_factor, make_base_optimizer
from flatcompress.training.steps import Means, share_perturbation, take_step

__all__ = [
    "Job", "accuracy", "epoch_batches", "fit", "loader", "lr_factor", "make_accelerator", "make_base_optimizer",
    "restore_best",
]  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]
ROLLBACK_LR = 0.5  # learning-rate factor of a rollback


def make_accelerator(device: str = "auto", precision: str = "no") -> Accelerator:
    """An Accelerator on ``device`` (auto | cpu | mps | cuda | cuda:N). UserError when that device is not there."""
    from flatcompress.training.devices import select

    cpu = select(device) == "cpu"
    # Accelerate keeps one state per process and refuses another precision; two runs in one program may differ.
    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(True)
    return Accelerator(cpu=cpu, mixed_precision=precision)


class Progress(Protocol):
    """Where a job saves its state while it runs, who may ask it to stop, and what it does when it fails.

    ``on_divergence``: stop | skip | rollback (at most ``max_rollbacks`` times); ``on_out_of_memory``: stop | halve.
    """

    on_divergence: str
    max_rollbacks: int
    on_out_of_memory: str

    def due(self, step: int) -> bool:
        """Is a save due after this step?"""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep ``state`` (nested plain data and tensors)."""

    def last(self) -> dict[str, Any] | None:
        """The newest state that was saved and can be read back."""

    def incident(self, finding: dict[str, Any]) -> None:
        """Record that a step diverged, and what was done about it."""

    @property
    def stop_requested(self) -> bool:
        """True once the user asked the run to stop."""


class Hook(Protocol):
    """Something with state that takes part in the training: masks, a freeze rule, an average."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""


@dataclass
class Trouble:
    """What a job met and how it goes on: skipped steps in a row, rollbacks, its learning-rate factor, batch parts."""

    skipped_in_a_row: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0
    parts: int = 1


@dataclass
class Job:
    """What `fit` trains and with what.

    ``validate`` returns accuracy on the training domains' validation split; ``after_backward()`` runs after every
    backward pass (masked gradients), ``after_step(step)`` after every optimizer step (masks, prune events),
    ``before_epoch(epoch)`` before an epoch's first batch, also when the job goes on in its middle, and
    ``after_epoch(epoch)`` before its validation; ``eligible(epoch)`` says whether an epoch may be selected as best.
    ``hooks`` are saved and restored with the job; ``resume`` is a state that ``progress`` once saved, and ``context``
    goes into every saved state untouched.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Any
    accelerator: Accelerator
    loss: Loss
    epochs: int
    batch_size: int
    seed: int
    validate: Callable[[], float]
    emit: Callable[..., None] = lambda event, **fields: None
    schedule: str = "one_cycle"
    workers: int = 0
    select: str = "best"
    first_epoch: int = 0
    schedule_epochs: int | None = None
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[int], None] = lambda step: None
    before_epoch: Callable[[int], None] = lambda epoch: None
    after_epoch: Callable[[int], None] = lambda epoch: None
    eligible: Callable[[int], bool] = lambda epoch: True
    hooks: dict[str, Hook] = field(default_factory=dict)
    progress: Progress | None = None
    resume: dict[str, Any] | None = None
    context: dict[str, Any] = field(default_factory=dict)
    best: tuple[float, dict[str, Tensor]] | None = field(default=None, init=False)
    trouble: Trouble = field(default_factory=lambda: Trouble(), init=False)

    @property
    def raw_model(self) -> nn.Module:
        """The module inside Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this process."""
        world = self.accelerator.num_processes
        return len(epoch_batches(len(self.train), self.batch_size, self.seed, 0, 0, world))


def fit(job: Job) -> None:
    """Train ``job.model`` in place; `restore_best` afterwards keeps the selected epoch.

    RunError when a value stops being finite (names step, layer and bits) and the progress has no other policy, and
    when memory runs out; Interrupted when the progress asks to stop.
    """
    base_lrs = [group["lr"] for group in job.optimizer.param_groups]
    if job.progress is not None and job.progress.on_divergence == "rollback" and job.resume is None:
        step = job.first_epoch * job.steps_per_epoch
        job.progress.save(step, _state(job, job.first_epoch, 0, Means(), base_lrs))
    while True:
        try:
            _run(job, base_lrs)
            break
        except Diverged as diverged:
            job.resume = _rolled_back(job, diverged)
    for group, lr in zip(job.optimizer.param_groups, base_lrs):
        group["lr"] = lr


def _run(job: Job, base_lrs: list[float]) -> None:
    epochs = job.schedule_epochs or job.epochs
    total = epochs * job.steps_per_epoch
    start, done, stats = _resume(job)
    for epoch in range(start, job.first_epoch + job.epochs):
        started = time.monotonic()
        job.model.train()
        job.before_epoch(epoch)
        for i, (x, y) in enumerate(_batches(job, epoch, done), done):
            step = epoch * job.steps_per_epoch + i
            factor = lr_factor(job.schedule, step, total) * job.trouble.lr_factor
            for group, lr in zip(job.optimizer.param_groups, base_lrs):
                group["lr"] = lr * factor
            take_step(job, x, y, step, stats)
            job.after_step(step + 1)
            _save_if_due(job, epoch, i + 1, step + 1, stats, base_lrs)
        _end_epoch(job, epoch, epochs, stats, time.monotonic() - started)
        done, stats = 0, Means()


def _end_epoch(job: Job, epoch: int, epochs: int, stats: Means, seconds: float) -> None:
    job.after_epoch(epoch)
    value = job.validate()
    if job.select == "best" and job.eligible(epoch) and (job.best is None or value >= job.best[0]):
        job.best = (value, {k: v.detach().clone() for k, v in job.raw_model.state_dict().items()})
    job.emit(
        "epoch",
        epoch=epoch + 1,
        epochs=epochs,
        loss=stats.loss,
        accuracy=stats.accuracy,
        val_accuracy=value,
        lr=job.optimizer.param_groups[0]["lr"],
        gap=stats.gap,
        passes=getattr(job.optimizer, "passes", None),
        seconds=seconds,
    )


def _save_if_due(job: Job, epoch: int, done: int, step: int, stats: Means, base_lrs: list[float]) -> None:
    if job.progress is None:
        return
    stop = job.progress.stop_requested  # asked once: several processes agree on the answer
    if not stop and not job.progress.due(step):
        return
    if divergence.parameters_finite(job.raw_model):  # else the next pass says so, and goes back
        job.progress.save(step, _state(job, epoch, done, stats, base_lrs))
    if stop:
        raise Interrupted(f"stopped after step {step}")


def _state(job: Job, epoch: int, done: int, stats: Means, base_lrs: list[float]) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "done": done,
        "stats": vars(stats),
        "base_lrs": base_lrs,
        "model": job.raw_model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "best": job.best,
        "hooks": {name: hook.state_dict() for name, hook in job.hooks.items()},
        "rng": capture(),
        "context": job.context,
        "trouble": asdict(job.trouble),
        **({} if job.accelerator.scaler is None else {"scaler": job.accelerator.scaler.state_dict()}),
    }


def _resume(job: Job) -> tuple[int, int, Means]:
    """Take ``job.resume`` over; returns the epoch, the batches done in it and the running means."""
    state, stats = job.resume, Means()
    if state is None:
        return job.first_epoch, 0, stats
    try:
        job.raw_model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(job.optimizer.param_groups, state["base_lrs"]):
            group["lr"] = lr
        job.best = tuple(state["best"]) if state["best"] is not None else None
        for name, hook in job.hooks.items():
            hook.load_state_dict(state["hooks"][name])
        vars(stats).update(state["stats"])
        job.trouble = Trouble(**state["trouble"])
        if job.trouble.parts > 1:
            share_perturbation(job)
        if job.accelerator.scaler is not None:
            job.accelerator.scaler.load_state_dict(state["scaler"])
        restore(state["rng"])
        return int(state["epoch"]), int(state["done"]), stats
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise RunError(f"the saved state does not fit this stage ({reason}). Use --restart to begin afresh.") from None


def _rolled_back(job: Job, diverged: Diverged) -> dict[str, Any]:
    """The state to go on from after a divergence, at a smaller learning rate. RunError when there is no way back."""
    progress = job.progress
    if progress is None or progress.on_divergence != "rollback":
        raise diverged
    if job.trouble.rollbacks >= progress.max_rollbacks:
        raise RunError(f"{diverged}. It went back {job.trouble.rollbacks} times in vain. {divergence.ADVICE}")
    state = progress.last()
    if state is None or state["context"] != job.context:
        raise RunError(f"{diverged}. There is no checkpoint of this part of the stage to go back to.")
    rollbacks, factor = job.trouble.rollbacks + 1, job.trouble.lr_factor * ROLLBACK_LR
    to = state["epoch"] * job.steps_per_epoch + state["done"]
    progress.incident({**diverged.finding, "action": "rollback", "to_step": to, "lr_factor": factor})
    return {**state, "trouble": {**state["trouble"], "rollbacks": rollbacks, "lr_factor": factor}}


def restore_best(job: Job) -> None:
    """Put the best epoch's weights back; without one (nothing eligible, or select='last') nothing changes."""
    if job.best is not None:
        job.raw_model.load_state_dict(job.best[1])
        job.emit("selected", val_accuracy=job.best[0])


def _batches(job: Job, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    accelerator = job.accelerator
    if hasattr(job.train, "set_epoch"):
        job.train.set_epoch(epoch)
    batches = epoch_batches(
        len(job.train), job.batch_size, job.seed, epoch, accelerator.process_index, accelerator.num_processes
    )
    with worker_errors(job.workers):
        for x, y in loader(job.train, batches[done:], job.workers):
            yield x.to(accelerator.device, non_blocking=True), y.to(accelerator.device, non_blocking=True)
