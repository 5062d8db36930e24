"""What goes from stage to stage: the model, its plan, the data and what has been measured so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from flatcompress.data import DataBundle
from flatcompress.plan import Plan
from flatcompress.training.loop import Progress


@dataclass
class Workpiece:
    """One model on its way through the stages.

    ``build`` makes a fresh float model as the recipe describes it; ``emit(event, **fields)`` writes to the log and
    the terminal; ``ledger`` has one row per finished stage; ``artifacts`` are files a stage has written. ``resume`` is
    the state of this very stage when it was interrupted, ``progress`` is where it saves such states.
    """

    model: nn.Module
    plan: Plan
    data: DataBundle
    build: Callable[[], nn.Module]
    accelerator: Accelerator
    seed: int
    batch_size: int
    workers: int = 0
    folder: Path | None = None
    recipe_hash: str = ""
    emit: Callable[..., None] = lambda event, **fields: None
    ledger: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    artifacts: dict[str, Path] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    resume: dict[str, Any] | None = None
    progress: Progress | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.accelerator.device

    def example(self, n: int = 2) -> torch.Tensor:
        """The first ``n`` test images, [n, C, H, W], on the model's device."""
        x, _ = self.data.test.__getitems__(list(range(min(n, len(self.data.test)))))
        return x.to(self.device)
