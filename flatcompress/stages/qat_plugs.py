"""What a QAT method plugs into the loop and the flat engine, put together from its row and the recipe's keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flatcompress import flat, quant
from flatcompress.prune import masks
from flatcompress.stages.configs import QuantizeConfig
from flatcompress.stages.methods import QatMethod

Loss = Callable[[Tensor, Tensor], Tensor]
# arXiv 2203.11086 starts both remedies after a quarter of the training; the threshold falls from ten times its end.
OSCILLATION_START = 0.25
THRESHOLD_START = 10.0


class Plugs:
    """The plugs of one QAT run on the quantized ``model``.

    ``compose`` and ``perturbed`` are the flat engine's slots, ``extra`` further tensors of the optimizer, ``hooks``
    what must be saved with a checkpoint. `release` takes everything off the model again.
    """

    def __init__(self, model: nn.Module, config: QuantizeConfig, method: QatMethod) -> None:
        self.model, self.config = model, config
        self.scales = {id(p) for p in quant.scale_parameters(model).values()}
        self.conflict = _conflict(model, config) if method.conflict else None
        point = config.perturb_point or method.point
        self.point = quant.QuantizedPoint(model) if point == "quantized" else None
        strength = (1.0 if method.bloop else 0.0) if config.bloop is None else config.bloop
        threshold = config.oscillation_threshold
        self.tracker = None if threshold is None else quant.OscillationTracker(model)
        self.hooks: dict[str, Any] = {}
        if self.conflict is not None:
            self.hooks["conflict"] = self.conflict
        if strength > 0:
            self.hooks["bloop"] = quant.ScaleBloop(model, strength)
        if method.alternate:
            self.hooks["alternation"] = quant.Alternation(model)
        self._composers = [*self.hooks.values(), *([self.point] if self.point is not None else [])]
        if self.tracker is not None:
            self.hooks["oscillation"] = self.tracker
        self.hooks["schedule"] = self
        self.progress = 0.0

    @property
    def extra(self) -> list[Tensor]:
        """Tensors that the optimizer must know beside the model's parameters."""
        return self.point.offsets if self.point is not None else []

    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """Every plug's compose function in turn."""
        for plug in self._composers:
            plug.compose(params, probes, combined)

    def perturbed(self, name: str, parameter: nn.Parameter) -> bool:
        """Which parameters move with the perturbation."""
        if self.point is not None:
            return self.point.perturbed(name, parameter)
        return self.config.perturb_scales or id(parameter) not in self.scales

    def after_backward(self) -> None:
        """A masked weight stays put at the perturbed point too when that lies after the quantizer."""
        if self.point is None:
            return
        for _, module, mask in masks.masked_layers(self.model):
            offset = getattr(module, "weight_offset", None)
            if offset is not None and offset.grad is not None:
                offset.grad.masked_fill_(~mask, 0)

    def after_step(self, progress: float) -> None:
        """Follow oscillations; ``progress`` is the share of the stage that is done."""
        self.progress = progress
        if self.conflict is not None:
            self.conflict.after_step()
        if self.tracker is None:
            return
        end = self.config.oscillation_threshold
        assert end is not None
        if progress >= OSCILLATION_START:
            since = (progress - OSCILLATION_START) / (1 - OSCILLATION_START)
            self.tracker.threshold = quant.anneal(THRESHOLD_START * end, end, since)
        self.tracker.step()

    def loss(self, task: Loss) -> Loss:
        """``task`` plus the dampening of oscillations, whose weight grows over the last three quarters."""
        if not self.config.dampen:
            return task

        def dampened(logits: Tensor, y: Tensor) -> Tensor:
            since = (self.progress - OSCILLATION_START) / (1 - OSCILLATION_START)
            if since <= 0:
                return task(logits, y)
            weight = quant.anneal(0.0, self.config.dampen, since)
            return task(logits, y) + weight * quant.dampening_loss(self.model)

        return dampened

    def state_dict(self) -> dict[str, Any]:
        """How far the stage is: the schedules of dampening and freezing follow it."""
        return {"progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.progress = float(state["progress"])

    def release(self) -> None:
        """Take the offsets off the model."""
        if self.point is not None:
            self.point.release()


def _conflict(model: nn.Module, config: QuantizeConfig) -> Any:
    return quant.ScaleConflict(
        model,
        K=config.K,
        tau=config.tau,
        tau_kind=config.tau_kind,
        mode=config.mode,
        freeze_target=config.freeze_target,
        granularity=config.granularity,
        refreeze=config.refreeze,
        remedy=config.remedy,
        mix=flat.METHODS[config.flat_method()].facts.mix,
    )
