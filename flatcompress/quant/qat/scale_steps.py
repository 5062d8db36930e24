"""How far quantizer scales move in a step, and in which steps: one learning rate for all sizes, and turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.quant.layers import scale_parameters, tensor_quantizers
from flatcompress.quant.quantizers.protocol import learns_step

Gradients = list[Tensor | None]


class RelativeSteps:
    """The optimizer trains log s in place of s, so that a step is a share of the scale's size.

    Scales of weights lie near 0.01 and those of activations near 1: under one learning rate Adam moves the former by
    percents a step and the latter not at all. With s = exp(sigma):

        dL/dsigma = s * dL/ds        before the optimizer's step (`compose`),
        s <- s * exp(delta)          after it (`after_step`), delta being the step it took.

    That is training sigma itself, up to rounding, with any optimizer whose step of an entry depends on that entry's
    gradients alone (SGD, Adam and their kin, weight decay off), and a scale stays positive. An offset (LSQ+'s beta)
    moves in units of its quantizer's scale: gradient s * dL/dbeta, step s * delta. UserError for a quantizer whose
    learned number is not a step.
    """

    def __init__(self, model: nn.Module) -> None:
        made = tensor_quantizers(model)
        self._scales: dict[int, nn.Parameter] = {}  # a parameter's id -> the scale whose size it moves by
        self._moved: list[nn.Parameter] = []
        for name, parameter in scale_parameters(model).items():
            quantizer = made.get(name, made.get(name.rpartition(".")[0]))
            if not learns_step(quantizer):
                raise UserError(
                    f"quantizer {name!r} learns no step of its own, so there is nothing to move by a share of it: take "
                    "absolute steps of scales, or quantizer lsq, lsq+ or pact."
                )
            self._scales[id(parameter)] = quantizer.scale
            self._moved.append(parameter)
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    @torch.no_grad()
    def compose(self, params: list[nn.Parameter], probes: Any, combined: Gradients) -> None:
        """The engine's compose slot: scales' entries of ``combined`` become gradients of their logarithms, in place."""
        self._before = []
        for i, parameter in enumerate(params):
            scale, gradient = self._scales.get(id(parameter)), combined[i]
            if scale is not None and gradient is not None:
                size = scale.detach().clone()
                combined[i] = gradient * size
                self._before.append((parameter, parameter.detach().clone(), size))

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer's step: what it added to a scale was a step of its logarithm."""
        for parameter, before, size in self._before:
            delta = parameter - before
            own = self._scales[id(parameter)] is parameter
            parameter.copy_(before * delta.exp() if own else before + size * delta)
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Nothing lasts from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class ScaleTurns:
    """Which of ``steps`` steps move the scales, and which the weights; what waits has no gradient in that step.

    ``warm_up``: in this share of the steps, at first, scales alone move. ``stop``: after this share they stand still
    (0: they never move). ``every``: between the two they and the weights take turns of so many steps, weights first
    (0: both move).
    """

    def __init__(self, model: nn.Module, steps: int, warm_up: float = 0.0, stop: float = 1.0, every: int = 0) -> None:
        self._scales = {id(p) for p in scale_parameters(model).values()}
        self.first, self.last, self.every = round(warm_up * steps), round(stop * steps), every
        self.t = 0

    @property
    def moving(self) -> tuple[bool, bool]:
        """(weights, scales): what the coming step moves."""
        if self.t < self.first:
            return False, True
        if self.t >= self.last:
            return True, False
        if not self.every:
            return True, True
        scales = (self.t - self.first) // self.every % 2 == 1
        return not scales, scales

    def compose(self, params: list[nn.Parameter], probes: Any, combined: Gradients) -> None:
        """The engine's compose slot; changes ``combined`` in place."""
        weights, scales = self.moving
        for i, parameter in enumerate(params):
            if not (scales if id(parameter) in self._scales else weights):
                combined[i] = None
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.t = int(state["t"])
