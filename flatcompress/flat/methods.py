"""The family: every member is a row of `METHODS`, a function of its hyper-parameters that returns a `Method`.

Each program below is the update as its paper writes it: ``g0 = yield HERE`` is the gradient at w,
``g1 = yield Probe(e)`` the one at w + e, and what is returned goes to the base optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.flat import vectors
from flatcompress.flat.ball import Ball
from flatcompress.flat.context import HERE, Probe, Program, Step
from flatcompress.flat.method import Method
from flatcompress.registry import Registry

Rho = float | Callable[[Step], Any]
Shift = Sequence[Tensor | None]

METHODS = Registry("flat method")


def none() -> Method:
    """The base optimizer alone."""
    return Method()


def sam(rho: Rho = 0.05, **ball: Any) -> Method:
    """SAM: g = grad L(w + e), e = rho g0 / ||g0|| (arXiv 2010.01412, eq. 2 and 3)."""
    ascent = Ball(rho, **ball)

    def program(step: Step) -> Program:
        g0 = yield HERE
        return (yield Probe(ascent(step, g0)))

    return Method(program, ascent)


def asam(rho: Rho = 0.5, eta: float = 0.01, geometry: Any = "elementwise", **ball: Any) -> Method:
    """ASAM: SAM in the metric T = |w| + eta, 1 on biases (arXiv 2102.11600, eq. 3, algorithm 1)."""
    return sam(rho, **{"eta": eta, "geometry": geometry, "tiny": 1e-16, **ball})


def sagm(rho: Rho = 0.05, alpha: float = 0.001, **ball: Any) -> Method:
    """SAGM: g = (g0 + g1) / 2 with e = (rho / ||g0|| - alpha) g0 (arXiv 2303.10353, eq. 8)."""
    ascent = Ball(rho, **ball)
    non_negative(alpha=alpha)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(plus(ascent(step, g0), ascent.metric(step, g0), -alpha))
        return vectors.scale(vectors.add(g0, g1), 0.5)

    return Method(program, ascent)


def plus(a: Shift, b: Shift, alpha: float = 1.0) -> Shift:
    """``a + alpha * b`` for perturbations, whose entries are None where nothing moves."""
    return [x if y is None else (y * alpha if x is None else x.add(y, alpha=alpha)) for x, y in zip(a, b)]


def non_negative(**values: float) -> None:
    """Refuse a negative or non-finite hyper-parameter by its name."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} is {value!r}; it must be a finite number >= 0")


METHODS.add("none", none, "the base optimizer alone")
METHODS.add("sam", sam, "sharpness-aware minimization: the gradient at the worst point of a ball", "2010.01412")
METHODS.add("asam", asam, "SAM in a ball that scales with the weights", "2102.11600")
METHODS.add("sagm", sagm, "gradient matching: loss, perturbed loss and their agreement", "2303.10353")
