"""A training job: what is trained, with what, for how long, and what has happened to it so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from flatcompress.sharded import is_divided
from flatcompress.tasks import Loss, Task, build
from flatcompress.training.batches import epoch_batches
from flatcompress.training.callback import Callback
from flatcompress.training.mixing import Mixed, Mixing


class Progress(Protocol):
    """Where a job saves its state while it runs, who may ask it to stop, and what it does when it fails.

    ``on_divergence``: stop | skip | rollback (at most ``max_rollbacks`` times); ``on_out_of_memory``: stop | halve.
    """

    on_divergence: str
    max_rollbacks: int
    on_out_of_memory: str

    def due(self, step: int) -> bool:
        """Is a save due after this step?"""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep ``state`` (nested plain data and tensors)."""

    def last(self) -> dict[str, Any] | None:
        """The newest state that was saved and can be read back."""

    def incident(self, finding: dict[str, Any]) -> None:
        """Record that a step diverged, and what was done about it."""

    @property
    def stop_requested(self) -> bool:
        """True once the user asked the run to stop."""


class Optimizer(Protocol):
    """What a job needs of its optimizer beyond torch's; `flat.create` makes such ones."""

    param_groups: list[dict[str, Any]]
    passes: int

    @property
    def last_gap(self) -> float | None:
        """Loss at the perturbed point of the last step minus the loss; None where there was none."""

    def step(self, closure: Any) -> Any:
        """One step; ``closure`` runs forward and backward and returns the loss; a list: a batch in parts."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def join_chunks(self) -> None:
        """From now on a batch in parts takes one perturbation from all of them, as the whole batch would."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""


@dataclass
class Recovery:
    """What a job met and how it resumes: skipped steps in a row, rollbacks, its learning-rate factor, batch parts."""

    skipped_in_a_row: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0
    parts: int = 1


@dataclass
class JobState:
    """What changes while a job runs: the best epoch's metric and weights, epochs since then, what it recovered from."""

    best: tuple[float, dict[str, Tensor]] | None = None
    waited: int = 0
    recovery: Recovery = field(default_factory=Recovery)


def _silent(event: str, **fields: Any) -> None:
    """Nobody listens."""


def _always(epoch: int) -> bool:
    return True


@dataclass(frozen=True)
class Job:
    """What `fit` trains and with what. Nothing is assigned to it afterwards; only ``state`` changes.

    ``loss(output, y)`` is what is minimised, ``task`` has the metric that selects, ``validate()`` gives that metric on
    the training domains' validation split. ``patience``: it ends after so many epochs without a better one;
    ``max_steps``: after so many steps of the stage. ``batch_size``: samples of an optimizer step, which go through the
    model in ``accumulate`` parts, each mixed by ``mixing``; ``balanced``: as many of each domain of ``train``.
    ``schedule``: see `schedules.rates`.
    ``callbacks`` take part in the order of the list, which whoever builds the job gives a reason for.
    ``eligible(epoch)`` says whether an epoch may be selected as best. ``selects``: the optimizer chooses samples by
    their losses, so its closure must be able to give them.
    ``resume`` is a state that ``progress`` once saved, and ``context`` goes into every saved state untouched.
    ValueError when two callbacks keep their state under the same name.
    """

    model: nn.Module
    optimizer: Optimizer
    train: Any
    accelerator: Accelerator
    loss: Loss
    epochs: int
    batch_size: int
    seed: int
    validate: Callable[[], float]
    task: Task = field(default_factory=build)
    callbacks: Sequence[Callback] = ()
    emit: Callable[..., None] = _silent
    schedule: Any = "one_cycle"
    workers: int = 0
    memory_format: str = "contiguous"
    select: str = "best"
    patience: int | None = None
    first_epoch: int = 0
    schedule_epochs: int | None = None
    accumulate: int = 1
    balanced: bool = False
    mixing: Mixing | None = None
    max_steps: int | None = None
    eligible: Callable[[int], bool] = _always
    selects: bool = False
    progress: Progress | None = None
    resume: dict[str, Any] | None = None
    context: dict[str, Any] = field(default_factory=dict)
    state: JobState = field(default_factory=JobState, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "callbacks", tuple(self.callbacks))
        names = [c.name for c in self.callbacks if c.name]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two callbacks of a job are named {min(twice)!r}; each keeps its state under its name.")

    @cached_property  # asked every step, as the next
    def raw_model(self) -> nn.Module:
        """The module inside Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @cached_property
    def divided(self) -> bool:
        """Whether the processes have parts of the weights."""
        return is_divided(self.raw_model)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this process."""
        return steps_per_epoch(self.train, self.batch_size, self.accelerator)

    @property
    def parts(self) -> int:
        """Passes that a step's samples are divided into."""
        return self.accumulate * self.state.recovery.parts

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        planned = (self.schedule_epochs or self.epochs) * self.steps_per_epoch
        return planned if self.max_steps is None else min(planned, self.max_steps)

    def total_loss(self, output: Tensor, y: Tensor, mixed: Mixed | None = None) -> Tensor:
        """The task's loss (of both targets where inputs are mixed) and the callbacks' terms, in the list's order."""
        total = self.loss(output, y)
        if mixed is not None:
            total = mixed.share * total + (1 - mixed.share) * self.loss(output, y[mixed.partner])
        for callback in self.callbacks:
            term = callback.loss_term(output, y)
            if term is not None:
                total = total + term
        return total


def steps_per_epoch(train: Any, batch_size: int, accelerator: Accelerator) -> int:
    """Optimizer steps in one epoch of this process."""
    return len(epoch_batches(len(train), batch_size, 0, 0, 0, accelerator.num_processes))
