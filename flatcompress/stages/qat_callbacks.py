"""What a QAT method puts into its training job: callbacks, some of which also sit in the flat engine's slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from flatcompress import quant
from flatcompress.prune import masks
from flatcompress.quant.quantizers.modules import QuantizedLayer
from flatcompress.training.callback import Callback, Training

# arXiv 2203.11086 starts both remedies after a quarter of the training; the threshold falls from ten times its end.
OSCILLATION_START = 0.25
THRESHOLD_START = 10.0
Compose = Callable[[list[nn.Parameter], Any, list[Tensor | None]], None]


class GradientTransform(Protocol):
    """Something with state that changes the combined gradient of a step, in place."""

    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """The flat engine's compose slot."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed job needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""


class Transform(Callback):
    """A gradient transform whose state is kept with the job under ``name``."""

    def __init__(self, name: str, inner: GradientTransform) -> None:
        self.name, self.inner = name, inner

    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """The flat engine's compose slot."""
        self.inner.compose(params, probes, combined)

    def state_dict(self) -> dict[str, Any]:
        """The transform's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""
        self.inner.load_state_dict(state)


def in_turn(transforms: Sequence[Transform]) -> Compose:
    """A compose function that applies every transform, one after the other."""

    def compose(params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        for transform in transforms:
            transform.compose(params, probes, combined)

    return compose


class Conflict(Transform):
    """Conflicting scale gradients, watched and frozen; one event of the log per finished window."""

    def __init__(self, watch: quant.ScaleConflict, emit: Callable[..., None]) -> None:
        super().__init__("conflict", watch)
        self.watch, self.emit = watch, emit

    def after_step(self, step: int) -> None:
        """Log a window that has just ended, and apply the remedy that acts on scales instead of gradients."""
        if self.watch.t and self.watch.t % self.watch.K == 0:
            self.emit("conflict", step=step, quantizers=self.watch.timeline())
        self.watch.after_step()


class ScaleSteps(Transform):
    """Scales move by shares of their size; the optimizer sees the gradients of their logarithms."""

    def __init__(self, steps: quant.RelativeSteps) -> None:
        super().__init__("scale_steps", steps)
        self.steps = steps

    def after_step(self, step: int) -> None:
        """Turn the optimizer's step into one of the logarithm."""
        self.steps.after_step()


class GridPull(Transform):
    """CAGE's pull of the weights towards their grid, at the learning rates of the step."""

    def __init__(self, pull: quant.Cage) -> None:
        super().__init__("cage", pull)
        self.pull = pull

    def open(self, job: Training) -> None:
        """Where the learning rates are."""
        self.job = job

    def after_step(self, step: int) -> None:
        """Move the weights."""
        groups = self.job.optimizer.param_groups
        self.pull.after_step({id(p): group["lr"] for group in groups for p in group["params"]})


class Point(Transform):
    """The perturbation after the quantizer: offsets of the quantized weights, taken away again when the job closes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.point = model, quant.QuantizedPoint(model)

    @property
    def offsets(self) -> list[Tensor]:
        """Tensors that the optimizer must know beside the model's parameters."""
        return self.point.offsets

    def perturbed(self, name: str, parameter: nn.Parameter) -> bool:
        """Which parameters move with the perturbation."""
        return self.point.perturbed(name, parameter)

    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """No gradient for the offsets."""
        self.point.compose(params, probes, combined)

    def after_backward(self) -> None:
        """A masked weight stays put at the perturbed point too."""
        for _, module, mask in masks.masked_layers(self.model):
            offset = module.weight_offset if isinstance(module, QuantizedLayer) else None
            if offset is not None and offset.grad is not None:
                offset.grad.masked_fill_(~mask, 0)

    def close(self) -> None:
        """Take the offsets off the model."""
        self.point.release()

    def state_dict(self) -> dict[str, Any]:
        """Offsets are zero between steps: there is nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Oscillation(Callback):
    """Weights that swing between two grid points: dampened by a term of the loss, frozen above a threshold, or both.

    ``threshold``: weights that change sides more often are frozen at the end (None: none are); ``dampen``: weight of
    the dampening loss at the end; ``steps``: optimizer steps of the whole stage. Both begin after a quarter of it.
    """

    name = "oscillation"

    def __init__(self, model: nn.Module, threshold: float | None, dampen: float, steps: int) -> None:
        self.model, self.threshold, self.dampen, self.steps = model, threshold, dampen, steps
        self.tracker = None if threshold is None else quant.OscillationTracker(model)
        self.progress = 0.0

    def loss_term(self, output: Tensor, y: Tensor) -> Tensor | None:
        """The dampening of oscillations, whose weight grows over the last three quarters."""
        since = self._since()
        if not self.dampen or since <= 0:
            return None
        return quant.anneal(0.0, self.dampen, since) * quant.dampening_loss(self.model)

    def after_step(self, step: int) -> None:
        """Follow the oscillations, by a threshold that falls over the last three quarters."""
        self.progress = step / self.steps
        if self.tracker is None:
            return
        assert self.threshold is not None
        if self.progress >= OSCILLATION_START:
            self.tracker.threshold = quant.anneal(THRESHOLD_START * self.threshold, self.threshold, self._since())
        self.tracker.step()

    def _since(self) -> float:
        """Share of the last three quarters that is over; below 0 before them."""
        return (self.progress - OSCILLATION_START) / (1 - OSCILLATION_START)

    def state_dict(self) -> dict[str, Any]:
        """How far the stage is, and what was counted."""
        return {"progress": self.progress, "tracker": None if self.tracker is None else self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.progress = float(state["progress"])
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])
