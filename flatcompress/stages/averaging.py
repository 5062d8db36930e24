"""Weight averaging as an option of the train and quantize stages: the average takes the place of the best epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from flatcompress.flat.averaging import EMA, SWA, SWAD, Average, update_bn
from flatcompress.modules import evaluating
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches
from flatcompress.training.batches import in_order
from flatcompress.training.callback import Callback, Training
from flatcompress.training.compiling import eager

SWA_START = 0.5  # share of the epochs before SWA begins
EMA_DECAY = 0.99  # about the last hundred steps: stages here are short
BN_SAMPLES = 4096


class Averaging(Callback):
    """An average of ``kind`` (ema, swa, swad) over a job of a stage of ``epochs`` epochs.

    ``keep_statistics``: BatchNorm's running statistics are not estimated anew for the average. ``as_shipped``: around
    every look at the validation split, see `job.make_job`.
    """

    name = "averaging"

    def __init__(
        self,
        run: RunContext,
        kind: str,
        epochs: int,
        keep_statistics: bool = False,
        as_shipped: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.run, self.keep_statistics, self.as_shipped = run, keep_statistics, as_shipped
        kinds: dict[str, Callable[[nn.Module], Average | SWAD]] = {
            "swa": SWA,
            "ema": lambda m: EMA(m, EMA_DECAY, warm_up=True),
            "swad": SWAD,
        }
        self.average = kinds[kind](run.model)
        self.first_step = round(SWA_START * epochs) * run.steps_per_epoch if kind == "swa" else 0
        self.job: Training | None = None

    def open(self, job: Training) -> None:
        """Follow this job's model."""
        self.job = job

    def after_step(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        if step > self.first_step:
            self.average.update()

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """SWAD watches the loss on the training domains' validation split."""
        if not isinstance(self.average, SWAD):
            return
        assert self.job is not None
        model, val, device = self.job.model, self.run.data.val, self.run.device
        summed = self.run.task.summed_loss
        with eager(model), self.as_shipped(), evaluating(model):
            losses = [float(summed(model(x.to(device)), y.to(device))) for x, y in in_order(val, 512)]
        self.average.evaluate(sum(losses) / len(val))

    def finish(self) -> None:
        """Put the average into the model and estimate its BatchNorm statistics (unless they are kept)."""
        assert self.job is not None
        if isinstance(self.average, SWAD):
            self.average.finish()
        model = self.job.raw_model
        self.average.copy_to(model)
        if not self.keep_statistics:
            update_bn(model, train_batches(self.run, BN_SAMPLES))
        self.job.emit("selected", **self.run.task.selected(self.job.validate()))

    def state_dict(self) -> dict[str, Any]:
        """The average's state."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""
        self.average.load_state_dict(state)
