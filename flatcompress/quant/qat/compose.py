"""Baselines for GAQAT as compose functions of a two-probe step: SQuAT's alternation and Bloop on the scales alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.quant.layers import scale_parameters

Gradients = list[Tensor | None]


class Alternation:
    """SQuAT (arXiv 2210.07171) in its decoupled form: the two losses never mix on a scale.

    Even steps move everything but the scales, by the method's own combined gradient; odd steps move the scales alone,
    by the plain loss's gradient (probe 0). A parameter that sits a step out has no gradient at all, so that momentum
    and weight decay leave it alone as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._scales = {id(p) for p in scale_parameters(model).values()}
        self.t = 0

    def compose(self, params: list[nn.Parameter], probes: list[Gradients], combined: Gradients) -> None:
        """The engine's compose slot; changes ``combined`` in place."""
        scales_turn = self.t % 2 == 1
        for i, parameter in enumerate(params):
            is_scale = id(parameter) in self._scales
            if is_scale != scales_turn:
                combined[i] = None
            elif is_scale:
                combined[i] = probes[0][i]
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is."""
        return {"t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.t = int(state["t"])


class ScaleBloop:
    """Bloop (arXiv 2402.02998, eq. 4, 5) on the scales: the smooth gradient may act only across the task gradient.

        m <- (1 - beta) g_task + beta m,   d = g_task + strength * (g_smooth - (g_smooth . m) / (m . m) * m)

    taken over all scales as one vector; on a single scalar the projection would leave nothing.
    """

    def __init__(self, model: nn.Module, strength: float = 1.0, beta: float = 0.9) -> None:
        if not 0 <= beta < 1:
            raise UserError(f"beta must lie in [0, 1); found {beta!r}.")
        self._scales = list(scale_parameters(model).values())
        self.strength, self.beta = strength, beta
        self.average = torch.zeros(sum(p.numel() for p in self._scales), device=self._scales[0].device)

    @torch.no_grad()
    def compose(self, params: list[nn.Parameter], probes: list[Gradients], combined: Gradients) -> None:
        """The engine's compose slot; changes the scales' entries of ``combined`` in place."""
        if len(probes) < 2:
            return
        position = {id(p): i for i, p in enumerate(params)}
        where = [position.get(id(p)) for p in self._scales]
        task, smooth = (self._vector(where, probe) for probe in probes[:2])
        self.average = self.beta * self.average + (1 - self.beta) * task
        square = self.average.dot(self.average)
        along = self.average.dot(smooth) / square if bool(square > 0) else torch.zeros_like(square)
        mixed = task + self.strength * (smooth - along * self.average)
        for index, part in zip(where, mixed.split([p.numel() for p in self._scales])):
            gradient = None if index is None else combined[index]
            if index is not None and gradient is not None:
                combined[index] = part.view_as(gradient)

    def _vector(self, where: list[int | None], probe: Gradients) -> Tensor:
        parts = []
        for index, scale in zip(where, self._scales):
            found = None if index is None else probe[index]
            parts.append(torch.zeros_like(scale).flatten() if found is None else found.flatten())
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """The running average."""
        return {"average": self.average.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.average = state["average"].clone().to(self.average.device)
