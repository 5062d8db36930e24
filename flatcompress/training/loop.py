"""The one training loop: every stage that trains goes through `fit`.

Devices, precision and processes are Accelerate's (`accelerate launch` works); the optimizer is any
`torch.optim.Optimizer` whose ``step(closure)`` runs the passes it needs, so the loop does not know which method
it is running. The order of the samples depends on (seed, stage, epoch) alone, which is what lets a run that was
stopped go on with the very same batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatcompress.errors import Interrupted, RunError
from flatcompress.training.rng import capture_rng, restore_rng

Loss = Callable[[Tensor, Tensor], Tensor]


def make_accelerator(device: str = "auto", precision: str = "no") -> Accelerator:
    """An Accelerator on ``device`` (auto | cpu | mps | cuda | cuda:N). UserError when that device is not there."""
    from flatcompress.training.devices import select

    return Accelerator(cpu=select(device) == "cpu", mixed_precision=precision)


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Index batches of one epoch for one process: a permutation fixed by (seed, epoch), cut into equal batches.

    The remainder is left out when there is at least one full batch, so that no BatchNorm sees a tiny batch and all
    processes take the same number of steps.

    >>> [len(b) for b in epoch_batches(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator).tolist()[rank::world]
    size = min(batch_size, n // world)
    return [order[i * size : (i + 1) * size] for i in range((n // world) // size)]


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> DataLoader:
    """A DataLoader over given index batches; a dataset with ``__getitems__`` gives whole batches at once."""
    collate = _pair if hasattr(dataset, "__getitems__") else None
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)


def _pair(batch: Any) -> Any:
    return batch


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Any, device: torch.device | str = "cpu", batch_size: int = 512) -> float:
    """Share of ``dataset`` that ``model`` classifies correctly, in eval mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    n = len(dataset)
    correct = 0
    for x, y in loader(dataset, [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]):
        correct += int((model(x.to(device)).argmax(1) == y.to(device)).sum())
    model.train(was_training)
    return correct / n


def make_base_optimizer(
    groups: list[dict[str, Any]], name: str, lr: float, weight_decay: float, momentum: float, nesterov: bool, betas: Any
) -> torch.optim.Optimizer:
    """The plain optimizer under a flat method. ``groups`` are torch parameter groups."""
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0
        )
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return cls(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas))


def lr_factor(schedule: str, step: int, total: int) -> float:
    """Learning-rate factor at ``step`` of ``total``.

    ``one_cycle`` warms up linearly over the first 30 % from 1/25 and then falls by a cosine to 1/10,000;
    ``cosine`` falls to 0, ``linear`` likewise in a straight line.
    """
    t = step / max(total, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - t)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
    if t < 0.3:
        return 0.04 + 0.96 * t / 0.3
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min((t - 0.3) / 0.7, 1.0)))


class Progress(Protocol):
    """Where a job saves its state while it runs, and who may ask it to stop."""

    def due(self, step: int) -> bool:
        """Is a save due after this step?"""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep ``state`` (nested plain data and tensors)."""

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
class Job:
    """What `fit` trains and with what.

    ``validate`` returns accuracy on the training domains' validation split; ``after_backward()`` runs after every
    backward pass (masked gradients), ``after_step(step)`` after every optimizer step (masks, prune events),
    ``after_epoch(epoch)`` before each epoch's validation; ``eligible(epoch)`` says whether an epoch may be selected
    as best. ``hooks`` are saved and restored with the job; ``resume`` is a state that ``progress`` once saved, and
    ``context`` goes into every saved state untouched.
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
    after_epoch: Callable[[int], None] = lambda epoch: None
    eligible: Callable[[int], bool] = lambda epoch: True
    hooks: dict[str, Hook] = field(default_factory=dict)
    progress: Progress | None = None
    resume: dict[str, Any] | None = None
    context: dict[str, Any] = field(default_factory=dict)
    best: tuple[float, dict[str, Tensor]] | None = field(default=None, init=False)

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

    RunError when the loss stops being finite (names the step); Interrupted when the progress asks to stop.
    """
    base_lrs = [group["lr"] for group in job.optimizer.param_groups]
    epochs = job.schedule_epochs or job.epochs
    total = epochs * job.steps_per_epoch
    start, done, stats = _resume(job)
    for epoch in range(start, job.first_epoch + job.epochs):
        started = time.monotonic()
        job.model.train()
        for i, (x, y) in enumerate(_batches(job, epoch, done), done):
            step = epoch * job.steps_per_epoch + i
            factor = lr_factor(job.schedule, step, total)
            for group, lr in zip(job.optimizer.param_groups, base_lrs):
                group["lr"] = lr * factor
            _step(job, x, y, step, stats)
            job.after_step(step + 1)
            _save_if_due(job, epoch, i + 1, step + 1, stats, base_lrs)
        _end_epoch(job, epoch, epochs, stats, time.monotonic() - started)
        done, stats = 0, _Means()
    for group, lr in zip(job.optimizer.param_groups, base_lrs):
        group["lr"] = lr


def _end_epoch(job: Job, epoch: int, epochs: int, stats: _Means, seconds: float) -> None:
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


def _save_if_due(job: Job, epoch: int, done: int, step: int, stats: _Means, base_lrs: list[float]) -> None:
    if job.progress is None or not (job.progress.stop_requested or job.progress.due(step)):
        return
    state = {
        "epoch": epoch,
        "done": done,
        "stats": vars(stats),
        "base_lrs": base_lrs,
        "model": job.raw_model.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "best": job.best,
        "hooks": {name: hook.state_dict() for name, hook in job.hooks.items()},
        "rng": capture_rng(),
        "context": job.context,
    }
    job.progress.save(step, state)
    if job.progress.stop_requested:
        raise Interrupted(f"stopped after step {step}")


def _resume(job: Job) -> tuple[int, int, _Means]:
    """Take ``job.resume`` over; returns the epoch, the batches done in it and the running means."""
    state, stats = job.resume, _Means()
    if state is None:
        return job.first_epoch, 0, stats
    job.raw_model.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    for group, lr in zip(job.optimizer.param_groups, state["base_lrs"]):
        group["lr"] = lr
    job.best = tuple(state["best"]) if state["best"] is not None else None
    for name, hook in job.hooks.items():
        hook.load_state_dict(state["hooks"][name])
    vars(stats).update(state["stats"])
    restore_rng(state["rng"])
    return state["epoch"], state["done"], stats


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
    for x, y in loader(job.train, batches[done:], job.workers):
        yield x.to(accelerator.device, non_blocking=True), y.to(accelerator.device, non_blocking=True)


def _step(job: Job, x: Tensor, y: Tensor, step: int, stats: _Means) -> None:
    seen: list[Tensor] = []

    def closure() -> Tensor:
        with job.accelerator.autocast():
            logits = job.model(x)
            loss = job.loss(logits, y)
        job.accelerator.backward(loss)
        job.after_backward()
        if not seen:
            seen.append((logits.detach().argmax(1) == y).float().mean())
        return loss

    job.optimizer.zero_grad()
    loss = float(job.optimizer.step(closure))  # type: ignore[arg-type]
    if not math.isfinite(loss):
        raise RunError(
            f"the loss became {loss} at step {step + 1}. Lower optimizer.lr or rho, or raise the bits, and run again."
        )
    stats.add(loss, float(seen[0]), getattr(job.optimizer, "last_gap", None), len(y))


class _Means:
    """Running means over an epoch's samples."""

    def __init__(self) -> None:
        self.n = 0
        self._loss = self._correct = self._gap = 0.0
        self._gaps = 0

    def add(self, loss: float, accuracy: float, gap: float | None, n: int) -> None:
        self.n += n
        self._loss += loss * n
        self._correct += accuracy * n
        if gap is not None:
            self._gap += float(gap) * n
            self._gaps += n

    @property
    def loss(self) -> float:
        return self._loss / max(self.n, 1)

    @property
    def accuracy(self) -> float:
        return self._correct / max(self.n, 1)

    @property
    def gap(self) -> float | None:
        return self._gap / self._gaps if self._gaps else None
