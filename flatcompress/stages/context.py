"""What goes from stage to stage: the model, its plan, the data and what has been measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from flatcompress.data import DataBundle
from flatcompress.errors import UserError
from flatcompress.plan import Plan
from flatcompress.stages.budget import Planned
from flatcompress.tasks import Task
from flatcompress.training import layout
from flatcompress.training.batches import evaluate, fitting
from flatcompress.training.callback import Callback
from flatcompress.training.job import Progress, steps_per_epoch
from flatcompress.training.mixing import Mixing


def _silent(event: str, **fields: Any) -> None:
    """Nobody listens."""


@contextmanager
def added(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds of the block to ``seconds[what]``."""
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.monotonic() - begun


@dataclass
class RunContext:
    """One model on its way through the stages, and what the stages may use.

    ``build`` makes a fresh float model as the recipe describes it; ``emit(event, **fields)`` writes to the log and
    the terminal, ``show(event, **fields)`` to the terminal alone; ``ledger`` has one row per finished stage;
    ``artifacts`` are files a stage has written. ``resume`` is the state of this very stage when it was interrupted,
    ``progress`` is where it saves such states, with ``phase``: which phase of the stage is running and what the
    earlier ones found (see `stage.run_stage`). ``callbacks`` are the user's own, and take part in every training job
    after the stage's. ``accumulate``: batches of an optimizer step of the running stage.
    ``memory_format``: as the recipe has it; ``laid``: what `layout` made of it. ``balanced``: batches
    have as many samples of each training domain. ``measuring``: how much
    is measured (see `budget`), ``planned``: of what training; ``strategy``: ddp, or fsdp where several processes divide
    the weights while they train (see `job.divided`); ``compiles``: training steps go through torch.compile;
    ``corrupted``: the corrupted parts as they are measured, once they were; ``statistics``: see `shipped`. ``spent``:
    where the running stage's time went, beside its training, in seconds; ``parts``: what of its own work is no step of
    the training.
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
    emit: Callable[..., None] = _silent
    show: Callable[..., None] = _silent
    ledger: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    artifacts: dict[str, Path] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    resume: dict[str, Any] | None = None
    progress: Progress | None = None
    phase: dict[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    accumulate: int = 1
    balanced: bool = False
    memory_format: str = "contiguous"
    laid: str | None = None
    measuring: str = "full"
    planned: Planned = field(default_factory=Planned)
    strategy: str = "ddp"
    compiles: bool = False
    corrupted: dict[str, Any] | None = None
    statistics: tuple[bytes, dict[str, Any]] | None = None
    spent: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of the block, which measures, to ``spent[what]``; of this stage alone."""
        with added(self.spent, what), self.doing(what, measuring=True):
            yield

    @contextmanager
    def doing(self, what: str, *, measuring: bool = False) -> Iterator[None]:
        """Show what the block does, in a few words, while it does it."""
        self.show("doing", what=what, measuring=measuring)
        try:
            with nullcontext() if measuring else self.part(what):
                yield
        finally:
            self.show("doing", what=None, measuring=measuring)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Add the seconds of the block, a part of the stage's own work beside its steps, to ``parts[what]``."""
        with added(self.parts, what):
            yield

    @property
    def task(self) -> Task:
        """What is learned."""
        return self.data.task

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.accelerator.device

    @property
    def divides(self) -> bool:
        """Whether training divides the weights over the processes; one alone has nothing to divide."""
        return self.strategy == "fsdp" and self.accelerator.num_processes > 1

    @property
    def layout(self) -> str:
        """``channels_last`` or ``contiguous``: how the model lies while it is trained and measured.

        UserError where the recipe asks for what the model's forward does not take.
        """
        if self.laid is None:
            wanted = "contiguous" if self.divides else self.memory_format  # parts are of contiguous weights
            self.laid = layout.chosen(wanted, self.model, self.data.input_shape, self.device)
            if self.laid == "channels_last":
                self.laid = self._tried(self.laid)
        return self.laid

    def _tried(self, wanted: str) -> str:
        with torch.random.fork_rng(devices=[]):
            problem = layout.problem(self.build().to(self.device), self.example())
        if problem is not None and self.memory_format == wanted:
            raise UserError(f"memory_format: {wanted}: the model does not run so ({problem}). Take auto or contiguous.")
        return wanted if problem is None else "contiguous"

    @property
    def together(self) -> int:
        """How many samples are evaluated at a time."""
        return fitting(self.data.input_shape, 512)

    def evaluate(self, model: nn.Module, dataset: Any, task: Task | None = None) -> dict[str, float]:
        """The metrics of ``model`` over ``dataset`` by name; several processes, which all ask, share the work."""
        several = self.accelerator.num_processes > 1
        return evaluate(model, dataset, task or self.task, self.device, self.together, self.workers, shared=several)

    @property
    def mixing(self) -> Mixing | None:
        """How training samples are mixed, as the data's augmentation has it; None: they are not."""
        settings = getattr(getattr(self.data.train, "augment", None), "settings", None)
        if settings is None or not (settings.mixup or settings.cutmix):
            return None
        return Mixing(settings.mixup, settings.cutmix, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this process."""
        return steps_per_epoch(self.data.train, self.batch_size * self.accumulate, self.accelerator)

    def example(self, n: int = 2) -> torch.Tensor:
        """The first ``n`` test images, [n, C, H, W], on the model's device."""
        x, _ = self.data.test.__getitems__(list(range(min(n, len(self.data.test)))))
        return x.to(self.device)
