"""One optimizer step of a job, and what the policies make of a step that diverges or runs out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatcompress.errors import RunError
from flatcompress.training import divergence, memory
from flatcompress.training.callback import Callback
from flatcompress.training.divergence import Diverged
from flatcompress.training.job import Job
from flatcompress.training.mixing import Mixed

MOST_SKIPS = 20  # steps left out in a row before a run is given up


class Means:
    """Running means over an epoch's samples."""

    def __init__(self) -> None:
        self.n = 0
        self._loss = self._correct = self._gap = 0.0
        self._gaps = 0

    def add(self, loss: float, score: float, gap: float | None, n: int) -> None:
        self.n += n
        self._loss += loss * n
        self._correct += score * n
        if gap is not None:
            self._gap += float(gap) * n
            self._gaps += n

    @property
    def loss(self) -> float:
        return self._loss / max(self.n, 1)

    @property
    def score(self) -> float:
        return self._correct / max(self.n, 1)

    @property
    def gap(self) -> float | None:
        return self._gap / self._gaps if self._gaps else None


def take_step(job: Job, x: Tensor, y: Tensor, step: int, stats: Means) -> None:
    """One optimizer step, or what the policies make of one that diverges or runs out of memory."""
    try:
        loss, score = _attempt(job, x, y, step)
    except Diverged as diverged:
        _skip(job, diverged)
        return
    job.state.recovery.skipped_in_a_row = 0
    stats.add(loss, score, job.optimizer.last_gap, len(y))


def _attempt(job: Job, x: Tensor, y: Tensor, step: int) -> tuple[float, float]:
    """The loss and the metric of the first pass, after one step in as many parts as needed."""
    while True:
        rows: list[Tensor] = []
        parts = memory.split(x, y, job.parts)
        mixed = [None if job.mixing is None else job.mixing(a, step, i) for i, (a, _, _) in enumerate(parts)]
        closures = [_closure(job, a, b, factor, step, rows, mix) for (a, b, factor), mix in zip(parts, mixed)]
        job.optimizer.zero_grad()
        try:
            loss = job.optimizer.step(closures[0] if len(closures) == 1 else closures)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            text = str(error)
        else:
            return float(loss), job.task.metric.finish(torch.cat(rows))
        _halve(job, x, y, step, text)


def _closure(
    job: Job, x: Tensor, y: Tensor, factor: float, step: int, rows: list[Tensor], mixed: Mixed | None
) -> Callable[..., Tensor]:
    if mixed is None and _chooses(job):
        return _selective(job, x, y, factor, step, rows)
    x = x if mixed is None else mixed.x
    checked = job.accelerator.scaler is None  # under loss scaling an overflow is expected and the step left out

    def closure() -> Tensor:
        with job.accelerator.autocast():
            logits = _logits(job, x, step)
            loss = job.total_loss(logits, y, mixed)
            loss = loss if factor == 1.0 else loss * factor
        _backward(job, loss)
        if len(rows) < job.parts:
            rows.append(job.task.metric.rows(logits.detach(), y))
        _refuse_divergence(job, x, loss, step, checked)
        return loss

    return closure


def _backward(job: Job, loss: Tensor) -> None:
    job.accelerator.backward(loss)
    for callback in job.callbacks:
        callback.after_backward()


def _refuse_divergence(job: Job, x: Tensor, loss: Tensor, step: int, checked: bool) -> None:
    gradients = divergence.gradients_of(job.optimizer.param_groups) if checked else []
    if not divergence.finite(loss, gradients):
        raise Diverged(divergence.find(job.raw_model, x, float(loss.detach()), step + 1))


def _chooses(job: Job) -> bool:
    """Does the flat method choose samples, and can it: a callback's term may belong to the batch as a whole."""
    plain = Callback.loss_term
    own = any(getattr(type(callback), "loss_term", plain) is not plain for callback in job.callbacks)
    return job.selects and not own


def _selective(job: Job, x: Tensor, y: Tensor, factor: float, step: int, rows: list[Tensor]) -> Callable[..., Tensor]:
    """The closure of a method that chooses samples: the losses of those in ``keep``, backward where that is allowed."""
    checked = job.accelerator.scaler is None

    def closure(keep: Tensor | None = None) -> Tensor:
        part, target = (x, y) if keep is None else (x[keep], y[keep])
        with job.accelerator.autocast():
            logits = _logits(job, part, step)
            each = torch.stack([job.loss(logits[i : i + 1], target[i : i + 1]) for i in range(len(target))])
            loss = job.total_loss(logits, target) * factor
        if torch.is_grad_enabled():
            _backward(job, loss)
        if len(rows) < job.parts:
            rows.append(job.task.metric.rows(logits.detach(), target))
        _refuse_divergence(job, part, loss, step, checked and torch.is_grad_enabled())
        return each.detach() * factor

    return closure


def _logits(job: Job, x: Tensor, step: int) -> Tensor:
    """The model's output; a quantizer that refuses its own scale has diverged like any other number."""
    try:
        return job.model(x)
    except RunError:
        if divergence.parameters_finite(job.raw_model):
            raise
        raise Diverged(divergence.find(job.raw_model, x, math.nan, step + 1)) from None


def _skip(job: Job, diverged: Diverged) -> None:
    """Leave the step out when the policy says so and that can help; else raise."""
    progress = job.progress
    policy = "stop" if progress is None else progress.on_divergence
    if policy == "rollback":
        raise diverged
    if progress is None or policy == "stop":
        raise RunError(f"{diverged}. {divergence.ADVICE} The same command resumes from the last checkpoint.")
    job.state.recovery.skipped_in_a_row += 1
    if job.state.recovery.skipped_in_a_row > MOST_SKIPS or not divergence.parameters_finite(job.raw_model):
        raise RunError(f"{diverged}. Leaving steps out does not help any more. {divergence.ADVICE}")
    job.optimizer.zero_grad()
    progress.incident({**diverged.finding, "action": "skip"})


def _halve(job: Job, x: Tensor, y: Tensor, step: int, reason: str) -> None:
    """Work through batches in twice as many parts from now on. RunError when that is not wanted or not possible."""
    job.optimizer.zero_grad()
    memory.release()
    size = len(y) // job.parts
    if job.progress is None or job.progress.on_out_of_memory != "halve" or size < 2:

        def attempt(n: int) -> None:
            job.accelerator.backward(job.total_loss(job.model(x[:n]), y[:n]))
            job.optimizer.zero_grad()

        fits = memory.largest_fitting(size, attempt)
        fitting = f"a batch size of {fits} would fit" if fits else "not even one sample fits"
        raise RunError(
            f"out of memory at step {step + 1} with {size} samples in a pass; {fitting} "
            f"({reason.splitlines()[0][:200] if reason else 'no reason given'}). "
            "Resume with --set on_out_of_memory=halve, which works through each batch in parts, or start over with a "
            "smaller data.batch_size."
        )
    job.state.recovery.parts *= 2
    job.optimizer.join_chunks()
    job.emit("warning", message=f"out of memory at step {step + 1}: batches now go in {job.parts} parts")
