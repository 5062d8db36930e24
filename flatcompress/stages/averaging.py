"""Weight averaging as an option of the train and quantize stages: the average takes the place of the best epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flatcompress.flat.averaging import EMA, SWA, SWAD, Average, update_bn
from flatcompress.modules import evaluating
from flatcompress.stages.configs import QuantizeConfig, TrainConfig
from flatcompress.stages.measure import train_batches
from flatcompress.stages.train import in_turn
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, loader

SWA_START = 0.5  # share of the epochs before SWA begins
EMA_DECAY = 0.99  # about the last hundred steps: stages here are short
BN_SAMPLES = 4096


class Averaging:
    """An average that follows a job; a hook of the training loop, so its state is saved and resumed with it."""

    def __init__(self, work: Workpiece, job: Job, config: TrainConfig | QuantizeConfig) -> None:
        self.work, self.job, self.kind = work, job, config.averaging
        self.keep_statistics = isinstance(config, QuantizeConfig) and config.freeze_bn
        model = job.raw_model
        kinds: dict[str, Callable[[nn.Module], Average | SWAD]] = {
            "swa": SWA,
            "ema": lambda m: EMA(m, EMA_DECAY),
            "swad": SWAD,
        }
        self.average = kinds[self.kind](model)
        self.first_step = round(SWA_START * config.epochs) * job.steps_per_epoch if self.kind == "swa" else 0
        job.hooks["averaging"] = self
        job.after_step = in_turn(job.after_step, self.update)  # masks first: the average sees what they hold at zero
        if isinstance(self.average, SWAD):
            job.after_epoch = in_turn(job.after_epoch, self.evaluate)

    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        if step > self.first_step:
            self.average.update()

    @torch.no_grad()
    def evaluate(self, epoch: int) -> None:
        """SWAD watches the loss on the training domains' validation split."""
        assert isinstance(self.average, SWAD)
        model, val = self.job.model, self.work.data.val
        batches = [list(range(i, min(i + 512, len(val)))) for i in range(0, len(val), 512)]
        with evaluating(model):
            losses = [
                float(
                    nn.functional.cross_entropy(model(x.to(self.work.device)), y.to(self.work.device), reduction="sum")
                )
                for x, y in loader(val, batches)
            ]
        self.average.evaluate(sum(losses) / len(val))

    def finish(self) -> None:
        """Put the average into the model and estimate its BatchNorm statistics (unless they are frozen)."""
        if isinstance(self.average, SWAD):
            self.average.finish()
        model = self.job.raw_model
        self.average.copy_to(model)
        if not self.keep_statistics:
            update_bn(model, train_batches(self.work, BN_SAMPLES))
        self.job.emit("selected", val_accuracy=self.job.validate())

    def state_dict(self) -> dict[str, Any]:
        """The average's state."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""
        self.average.load_state_dict(state)
