"""What surrounds a method: how its passes run and what is done with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine.context import Noise, Step
from flatcompress.flat.engine.vectors import Vector

Compose = Callable[[list[nn.Parameter], list[list[Tensor | None]], list[Tensor | None]], None]
Radius = Callable[[list[nn.Parameter]], Sequence[Tensor | float]]
Filter = Callable[[Step, Vector], Vector]

PERTURB = ("per_replica", "synced")
CHUNKS = ("independent", "joint")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a `FlatOptimizer` that is not the method; `flatcompress.flat.create` takes the same keywords.

    perturb: ``per_replica`` (each process climbs along its own gradient, the combined gradient is averaged once) or
        ``synced`` (every gradient is averaged, as if one process saw the whole batch).
    chunks: for a list of closures, ``independent`` perturbs each micro-batch on its own (m-SAM), ``joint`` takes one
        perturbation from all of them (and calls each closure once per pass).
    max_grad_norm: clips the combined gradient. Clipping before the first pass would do nothing: it is normalised.
    scaler: the ``torch.amp.GradScaler`` that the closure scales its loss with. The engine unscales and updates it.
    compose: ``compose(params, probes, combined)`` may change the combined gradient in place, once a step.
    radius: ``radius(params)`` gives a radius per parameter (a float, or a tensor that broadcasts), replacing rho.
    perturbed: ``perturbed(name, parameter)`` says which parameters are perturbed at all.
    filters: functions ``(step, gradient) -> gradient`` applied before clipping, see ``flat.guards``.
    safety: a context manager factory ``(step, gradient)`` around the base optimizer, ``flat.guards.GhostRadius``.
    process_group: reduce over this group for a model that is not a DistributedDataParallel.
    replay_noise: dropout and stochastic depth draw the same noise in all passes of a step.
    freeze_buffers: running statistics and all other buffers move in the first pass only; False reproduces published
        code that lets every pass move them.
    noise, seed: the source of random perturbations, ``noise(draw, params) -> tensors``, or a seed for normal ones.

    Raises UserError for a choice that is none of the allowed ones and for max_grad_norm <= 0.
    """

    perturb: str = "per_replica"
    chunks: str = "independent"
    max_grad_norm: float | None = None
    scaler: Any = None
    compose: Compose | None = None
    radius: Radius | None = None
    perturbed: Callable[[str, nn.Parameter], bool] | None = None
    filters: Sequence[Filter] = ()
    safety: Any = None
    process_group: Any = None
    replay_noise: bool = True
    freeze_buffers: bool = True
    noise: Noise | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (("perturb", self.perturb, PERTURB), ("chunks", self.chunks, CHUNKS)):
            if value not in allowed:
                raise unknown(name, value, allowed)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm!r}; it must be > 0, or None for no clipping")
