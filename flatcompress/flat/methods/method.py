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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flatcompress.flat.engine.ball import Ball
from flatcompress.flat.engine.context import HERE, Program, Step
from flatcompress.flat.engine.vectors import Vector

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
class Method:
    """One row; the module's text says what each part does.

    ball: the ball that ``program`` uses, if it has one.
    keeps: REMEMBER or UPDATE want what the program kept (its `Result.kept`, else the gradients at its probes).
        It is averaged over micro-batches and processes, so state is the same in every process.
    check: called once with a step when an optimizer is created; raises UserError where the method cannot work.
    """

    program: Callable[[Step], Program] = plain
    ball: Ball | None = None
    when: When = always
    otherwise: Callable[[Step], Program] = plain
    remember: Remember | None = None
    update: Update = base_update
    keeps: bool = False
    check: Callable[[Step], None] | None = None
