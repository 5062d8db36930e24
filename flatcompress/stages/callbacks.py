"""Callbacks that several stages put into their jobs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatcompress import quant
from flatcompress.prune import masks
from flatcompress.tasks import Task
from flatcompress.tasks.agreement import distillation
from flatcompress.training.callback import Callback, Training


class Heartbeat(Callback):
    """Shows how far the training is: a step event now and then, of ``steps`` in the whole stage; never in the log."""

    EVERY = 0.5  # seconds

    def __init__(self, show: Callable[..., None], steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.show, self.steps, self._clock = show, steps, clock
        self._last: float | None = None

    def after_step(self, step: int) -> None:
        """Show it, the first one and the last one always."""
        now = self._clock()
        if self._last is None or step == self.steps or now - self._last >= self.EVERY:
            self._last = now
            self.show("step", step=step, steps=self.steps)


class MaskedWeights(Callback):
    """Weights that carry a mask stay exactly zero: their gradients are zeroed in every pass, their values each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, masks.maskable(model)

    def before_epoch(self, epoch: int) -> None:
        """Look the layers up."""
        self.layers = masks.maskable(self.model)

    def after_backward(self) -> None:
        """Zero the masked weights' gradients."""
        masks.mask_gradients_(self.model, self.layers)

    def after_step(self, step: int) -> None:
        """Zero the masked weights."""
        masks.enforce_(self.model, self.layers)


class FrozenBatchNorm(Callback):
    """BatchNorm normalises by its running statistics from each epoch's first batch on, and leaves them as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def before_epoch(self, epoch: int) -> None:
        """Put every BatchNorm into eval mode; the loop has put the whole model into train mode."""
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class BiasRounding(Callback):
    """From epoch ``first`` on the forward rounds folded biases as the exported file does."""

    def __init__(self, model: nn.Module, first: int) -> None:
        self.model, self.first = model, first

    def before_epoch(self, epoch: int) -> None:
        """Round, or not yet."""
        quant.set_bias_rounding(self.model, epoch >= self.first)

    def after_epoch(self, epoch: int) -> None:
        """An epoch is judged, and saved as the best one, as the next one trains."""
        quant.set_bias_rounding(self.model, epoch + 1 >= self.first)


class Distillation(Callback):
    """Adds ``weight`` times the distillation loss; the teacher reads the batch that the model reads, once a step.

    A hook on the model hands the teacher its input; it is taken off again when the job closes.
    """

    def __init__(self, teacher: nn.Module, weight: float, task: Task) -> None:
        self.teacher, self.weight, self.task = teacher, weight, task
        self._input: Tensor | None = None
        self._logits: Tensor | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def open(self, job: Training) -> None:
        """Follow the model's inputs."""
        self._handle = job.raw_model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and self._input is not inputs[0]:
            self._input = inputs[0]
            with torch.no_grad():
                self._logits = self.teacher(inputs[0])

    def loss_term(self, output: Tensor, y: Tensor) -> Tensor:
        """The weighted distillation loss of the batch that was read last."""
        assert self._logits is not None
        if self.task.agreement == "argmax" and output.ndim == 2:
            return self.weight * quant.distillation_loss(output, self._logits)
        return self.weight * distillation(self.task.agreement, output, self._logits)

    def close(self) -> None:
        """Let the model go."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._input = self._logits = None
