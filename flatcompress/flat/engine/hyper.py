"""Checks of hyper-parameters and small arithmetic on perturbations, shared by the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flatcompress.errors import UserError

Shift = Sequence[Tensor | None]


def non_negative(**values: float) -> None:
    """Refuse a negative or non-finite hyper-parameter by its name."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} is {value!r}; it must be a finite number >= 0")


def share(name: str, value: float) -> None:
    """Refuse a value outside 0..1 by its name."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; it must lie in 0..1")


def plus(a: Shift, b: Shift, alpha: float = 1.0) -> list[Tensor | None]:
    """``a + alpha * b`` for perturbations, whose entries are None where nothing moves."""
    return [x if y is None else (y * alpha if x is None else x.add(y, alpha=alpha)) for x, y in zip(a, b)]
