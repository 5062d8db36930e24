"""CAGE (arXiv 2510.18784): a pull of the weights towards their grid beside the straight-through gradient.

A quantized optimum is a compromise of two aims, grad f(w) = 0 and w = Q(w); its condition is
    grad f(w) + lam (w - Q(w)) = 0.
So every step adds lam_t e_t, e_t = w - Q(w) without a gradient of its own (algorithm 1), where r = (t + 1) / T and
    lam_t = 0 for r <= s,   lam (r - s) / (1 - s) afterwards:
nothing in the silent share s of the training, then a linear rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.quant.layers import quantized_layers


class Cage:
    """The pull, ``strength`` lam, over ``steps`` T optimizer steps, the first share ``silence`` s of them without.

    decoupled: ``w -= lr lam_t e_t`` beside the optimizer's update, which knows nothing of it (call `after_step`, as
    weight decay in AdamW); coupled: lam_t e_t is added to the gradient in `compose`. Everything is in `state_dict`.
    """

    def __init__(
        self, model: nn.Module, steps: int, strength: float = 10.0, silence: float = 0.5, coupled: bool = False
    ) -> None:
        if strength < 0 or not 0 <= silence < 1 or steps < 1:
            raise UserError(
                f"CAGE needs strength >= 0, 0 <= silence < 1 and steps >= 1; found {strength}, {silence} and {steps}."
            )
        self.layers = quantized_layers(model)
        self.steps, self.strength, self.silence, self.coupled = steps, strength, silence, coupled
        self.t = 0
        self._pulls: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def weight(self) -> float:
        """lam_t of the coming step.

        >>> cage = Cage(nn.Linear(1, 1), steps=4, strength=10.0, silence=0.5)
        >>> found = []
        >>> for cage.t in range(4):
        ...     found.append(cage.weight)
        >>> found
        [0.0, 0.0, 5.0, 10.0]
        """
        done = min(1.0, (self.t + 1) / self.steps)
        return 0.0 if done <= self.silence else self.strength * (done - self.silence) / (1 - self.silence)

    @torch.no_grad()
    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """The engine's compose slot: adds the pull to ``combined`` in place, or keeps it for `after_step`."""
        weight, self.t = self.weight, self.t + 1
        self._pulls = []
        if not weight:
            return
        pulls = {id(layer.weight): layer for layer in self.layers.values()}
        for i, parameter in enumerate(params):
            layer, gradient = pulls.get(id(parameter)), combined[i]
            if layer is None or gradient is None:
                continue
            pull = weight * (parameter - layer.quantized_weight())
            if self.coupled:
                combined[i] = gradient + pull
            else:
                self._pulls.append((parameter, pull))

    @torch.no_grad()
    def after_step(self, rates: Mapping[int, Any]) -> None:
        """After the optimizer's step: the decoupled pull. ``rates``: the learning rate by a parameter's id."""
        for parameter, pull in self._pulls:
            parameter.sub_(pull * rates[id(parameter)])
        self._pulls = []

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.t = int(state["t"])
