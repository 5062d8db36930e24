"""A member of the family as plain data: which steps, which points, how their gradients are put together.

WHEN      method.when(step): does this step do the extra work?
PROBES    method.program(step): a generator that yields the points where gradients are taken, is sent each
          gradient, and returns the COMBINED one; SAM is
              g0 = yield HERE
              return (yield Probe(ball(step, g0)))
          DIRECTION and BALL are functions that a program calls between two probes.
OTHERWISE the program of the steps that WHEN leaves out
REMEMBER  state for later steps, from the gradients of this one
UPDATE    what applies the combined gradient: normally the base optimizer, with what belongs AFTER it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatcompress.flat.engine.ball import Ball
from flatcompress.flat.engine.context import HERE, Program, Step
from flatcompress.flat.engine.vectors import Vector

Mix = tuple[float, float]
When = Callable[[Step], bool]
Remember = Callable[[Step, Sequence[Vector], Vector], None]
Update = Callable[[Step, Sequence[Vector], Vector, Callable[[], None]], None]


def always(step: Step) -> bool:
    """WHEN: every step."""
    return True


def plain(step: Step) -> Program:
    """The ordinary gradient, one pass."""
    return (yield HERE)


def base_update(step: Step, kept: Sequence[Vector], combined: Vector, apply: Callable[[], None]) -> None:
    """UPDATE: the base optimizer's own step."""
    apply()


@dataclass(frozen=True)
class Bounds:
    """What a hyper-parameter may be."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with ``value``; None when nothing is.

        >>> Bounds(0).problem(-1.0), Bounds(0, 1, open_high=True).problem(1.0), Bounds(0).problem(0.0)
        ('must be 0 or greater', 'must lie in 0 <= value < 1', None)
        """
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return None
        if self.high == math.inf:
            return f"must be above {self.low:g}" if self.open_low else f"must be {self.low:g} or greater"
        low, high = ("<" if open_end else "<=" for open_end in (self.open_low, self.open_high))
        return f"must lie in {self.low:g} {low} value {high} {self.high:g}"


@dataclass(frozen=True)
class Facts:
    """What others must know of a row.

    bounds: of hyper-parameters, by name. mix: how the returned gradient is made of the one at w and the perturbed one,
    as (share of the gradient at w, share of the perturbed one), or a function of the hyper-parameters that gives them,
    None where it is not made of these two. of_logits: it takes the model's output for logits. elsewhere: it runs the
    model with weights of its own.
    """

    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    mix: Mix | Callable[[Mapping[str, Any]], Mix | None] = (0.0, 1.0)
    of_logits: bool = False
    elsewhere: bool = False


@dataclass(frozen=True)
class Method:
    """One row; the module's text says what each part does.

    ball: the ball that ``program`` uses, if it has one.
    keeps: REMEMBER or UPDATE want what the program kept (its `Result.kept`, else the gradients at its probes).
        It is averaged over micro-batches and processes, so state is the same in every process.
    check: called once with a step when an optimizer is created; raises UserError where the method cannot work.
    joint: the program sees all closures of a step at once (and may ask for one of them by `Probe.part`).
    selects: it chooses samples, for which the closure needs a parameter ``keep``.
    """

    program: Callable[[Step], Program] = plain
    ball: Ball | None = None
    when: When = always
    otherwise: Callable[[Step], Program] = plain
    remember: Remember | None = None
    update: Update = base_update
    keeps: bool = False
    check: Callable[[Step], None] | None = None
    joint: bool = False
    selects: bool = False
