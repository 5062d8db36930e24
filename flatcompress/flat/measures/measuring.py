"""What the measures share: evaluation mode, losses at displaced weights, gradients, logit normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine.context import Probe
from flatcompress.flat.engine.passes import Points
from flatcompress.flat.engine.snapshot import Buffers
from flatcompress.flat.engine.vectors import Vector
from flatcompress.modules import evaluating, logits_of

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
Choice = Callable[[str, nn.Parameter], bool]


def normalized_logits(z: Tensor) -> Tensor:
    """``(z - mean(z)) / max(||z - mean(z)||, 1e-10)`` per sample: scaling the last layer changes nothing."""
    centred = z - z.mean(dim=-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-10)


@dataclass
class Probed:
    """A model in evaluation mode, its chosen parameters, and its loss at displaced weights."""

    model: nn.Module
    loss: Loss
    names: list[str]
    params: list[nn.Parameter]
    normalize_logits: bool = False
    points: Points = field(default_factory=Points)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one batch at the present weights, with a graph when gradients are enabled."""
        out = logits_of(self.model(x))
        return self.loss(normalized_logits(out) if self.normalize_logits else out, y)

    def at(self, shift: Sequence[Tensor | None], x: Tensor, y: Tensor) -> float:
        """The loss of one batch at w + shift; None where a parameter stays."""
        with torch.no_grad(), self.points.at(self.params, Probe(shift)):
            return float(self.value(x, y))

    def gradient(self, x: Tensor, y: Tensor, shift: Sequence[Tensor] | None = None) -> tuple[float, Vector]:
        """Loss and gradient of one batch at w + shift; zeros for parameters that the loss does not reach."""
        with torch.no_grad(), self.points.at(self.params, Probe(shift)), torch.enable_grad():
            loss = self.value(x, y)
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
        return float(loss.detach()), [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]


@contextmanager
def probed(
    model: nn.Module, loss: Loss, *, normalize_logits: bool = False, perturbed: Choice | None = None
) -> Iterator[Probed]:
    """The model in evaluation mode, left as it was found: mode, weights, buffers and gradients."""
    chosen = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (perturbed is None or perturbed(n, p))]
    if not chosen:
        raise UserError("no parameter to perturb: none requires a gradient, or `perturbed` chose none")
    with evaluating(model), Buffers(model).frozen():
        yield Probed(model, loss, [n for n, _ in chosen], [p for _, p in chosen], normalize_logits)


def listed(batches: Batches, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The batches on the model's device; an empty iterable is an error."""
    device = next(model.parameters()).device
    found = [(x.to(device), y.to(device)) for x, y in batches]
    if not found:
        raise UserError("no batches: a sharpness measure needs at least one (inputs, targets) pair")
    return found
