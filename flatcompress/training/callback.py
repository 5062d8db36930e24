"""What takes part in a job's training beside the model, the loss and the optimizer: its callbacks.

A job holds one list of callbacks, fixed when the job is built, and every event goes through that list in its order.
The list is therefore where the order is decided, and where the reason for it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Training(Protocol):
    """What a callback sees of the job that it takes part in."""

    @property
    def model(self) -> nn.Module:
        """The model as it is trained, inside Accelerate's wrappers."""

    @property
    def raw_model(self) -> nn.Module:
        """The model without wrappers."""

    @property
    def optimizer(self) -> Any:
        """The flat optimizer."""

    @property
    def epochs(self) -> int:
        """Epochs of this job."""

    @property
    def first_epoch(self) -> int:
        """Number of its first epoch; more than 0 where an earlier job of the same stage came before."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch of this process."""

    @property
    def validate(self) -> Callable[[], float]:
        """Gives the metric on the training domains' validation split."""

    @property
    def emit(self) -> Callable[..., None]:
        """``emit(event, **fields)`` writes one event to the log."""


class Callback:
    """One thing that takes part in a job's training. Subclass it and write the methods that are needed.

    ``open`` comes first, also when a job resumes, and ``close`` last, also after an error: what the first attaches to
    the model, the second takes away. Between them: ``before_epoch(epoch)`` before the first batch of an epoch, also
    when the job resumes in its middle; ``loss_term(output, y)`` in every pass, added to the task's loss;
    ``after_backward()`` after every backward pass; ``after_step(step)`` after optimizer step ``step``, counted from 1
    over the stage; ``after_epoch(epoch)`` before the epoch is validated. ``state_dict`` is saved with the job and
    handed to ``load_state_dict`` when it resumes; ``name`` is the key of that state, once in a job.

    >>> class Count(Callback):
    ...     name = "count"
    ...     steps = 0
    ...
    ...     def after_step(self, step):
    ...         self.steps += 1
    ...
    ...     def state_dict(self):
    ...         return {"steps": self.steps}
    ...
    ...     def load_state_dict(self, state):
    ...         self.steps = int(state["steps"])
    """

    name: str = ""

    def open(self, job: Training) -> None:
        """The training begins, or resumes."""

    def before_epoch(self, epoch: int) -> None:
        """An epoch's first batch comes next."""

    def loss_term(self, output: Tensor, y: Tensor) -> Tensor | None:
        """What is added to the loss of this pass, a scalar, or None."""
        return None

    def after_backward(self) -> None:
        """The gradients of one pass are there."""

    def after_step(self, step: int) -> None:
        """The optimizer has taken step ``step``."""

    def after_epoch(self, epoch: int) -> None:
        """An epoch is over and not validated yet."""

    def close(self) -> None:
        """The training is over, done, interrupted or failed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed job needs, as nested plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state over."""
