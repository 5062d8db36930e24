"""Learning-rate schedules: named ones, functions of the step, and torch's schedulers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError

Rates = Callable[[int], list[float]]
NAMES = ("cosine", "one_cycle", "linear", "constant")


def lr_factor(schedule: str, step: int, total: int) -> float:
    """Learning-rate factor at ``step`` of ``total``.

    ``one_cycle`` warms up linearly over the first 30 % from 1/25 and then falls by a cosine to 1/10,000;
    ``cosine`` falls to 0, ``linear`` likewise in a straight line.
    """
    t = step / max(total, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - t)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
    if t < 0.3:
        return 0.04 + 0.96 * t / 0.3
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min((t - 0.3) / 0.7, 1.0)))


def rates(schedule: Any, base: Sequence[float], total: int, factor: float = 1.0) -> Rates:
    """``rates(step)`` -> the learning rate of every parameter group, times ``factor``, for steps in rising order.

    ``schedule``: a name; ``f(step, total)`` -> factor; or ``f(optimizer)`` -> a scheduler of torch.optim.lr_scheduler,
    which is stepped after every optimizer step. The same steps give the same rates, so nothing need be saved.
    UserError for one that changes more than learning rates, or needs a metric.
    """
    if isinstance(schedule, str):
        return lambda step: [lr * (lr_factor(schedule, step, total) * factor) for lr in base]
    if not makes_scheduler(schedule):
        return lambda step: [lr * (_number(schedule, step, total) * factor) for lr in base]
    return _Followed(schedule, base, factor)


def makes_scheduler(schedule: Callable[..., Any]) -> bool:
    """Does it take an optimizer alone? Otherwise it takes step and total."""
    try:
        needed = [p for p in inspect.signature(schedule).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        return False
    return len(needed) == 1


def _number(schedule: Callable[[int, int], Any], step: int, total: int) -> float:
    value = schedule(step, total)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise UserError(f"schedule: the factor at step {step} of {total} is {value!r}; it must be 0 or more.")
    return found


class _Followed:
    """A torch scheduler on an optimizer of its own, which has the groups' learning rates and no parameters to move."""

    def __init__(self, make: Callable[[Any], Any], base: Sequence[float], factor: float) -> None:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base]
        self.optimizer, self.factor, self.at = torch.optim.SGD(groups, lr=1.0, momentum=0.9), factor, 0
        self.scheduler = make(self.optimizer)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("schedule: ReduceLROnPlateau needs a metric at every step; see 'patience'.")
        if not hasattr(self.scheduler, "step"):
            raise UserError(f"schedule: a torch scheduler is wanted, found {type(self.scheduler).__name__}.")

    def __call__(self, step: int) -> list[float]:
        while self.at < step:
            self.optimizer.step()
            self.scheduler.step()
            self.at += 1
        if any(group["momentum"] != 0.9 for group in self.optimizer.param_groups):
            raise UserError("schedule: the scheduler changes the momentum as well; give it cycle_momentum=False.")
        return [float(group["lr"]) * self.factor for group in self.optimizer.param_groups]


def try_out(schedule: Any, lr: float) -> None:
    """Its first and second rate. UserError when there are none."""
    found = rates(schedule, [lr], 10)
    try:
        for step in (0, 1):
            found(step)
    except UserError:
        raise
    except Exception as error:  # the user's own function may raise anything
        raise UserError(f"schedule: it raises {type(error).__name__}: {error}.") from None
