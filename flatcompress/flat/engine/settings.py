"""What surrounds a method: how its passes run and what is done with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatcompress.flat.engine.context import Noise, Step
from flatcompress.flat.engine.vectors import Vector

Compose = Callable[[list[nn.Parameter], list[list[Tensor | None]], list[Tensor | None]], None]
Radius = Callable[[list[nn.Parameter]], Sequence[Tensor | float]]
Filter = Callable[[Step, Vector], Vector]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a FlatOptimizer that is not the method. `flatcompress.flat.factory.create` says what each is."""

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
