"""Where a run's result lies in the spread that its recipe was measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDE = 2.0  # standard deviations that one run in twenty is outside of


def sentences(expected: Mapping[str, Sequence[float]] | None, ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each figure of ``expected`` (key of the last row's accuracy -> mean, standard deviation).

    >>> sentences({"test": (0.99, 0.004)}, [{"accuracy": {"test": 0.985}}])
    ['test 98.5 %: within the 99.0 ± 0.4 % that this recipe gives, 1.3 deviations below the mean']
    >>> sentences({"test": (0.99, 0.004)}, [{"accuracy": {"test": 0.95}}])
    ['test 95.0 %: OUTSIDE the 99.0 ± 0.4 % that this recipe gives, 10.0 deviations below the mean']
    """
    found = (ledger[-1].get("accuracy") or {}) if ledger else {}
    return [_sentence(key, found.get(key), *spread) for key, spread in (expected or {}).items()]


def _sentence(key: str, value: float | None, mean: float, deviation: float) -> str:
    told = f"{100 * mean:.1f} ± {100 * deviation:.1f} % that this recipe gives"
    name = key.replace("_", "-")
    if value is None:
        return f"{name}: not measured, so not compared with the {told}"
    away = abs(value - mean) / deviation if deviation else (0.0 if value == mean else float("inf"))
    side = "at" if value == mean else f"{away:.1f} deviations {'below' if value < mean else 'above'}"
    return f"{name} {100 * value:.1f} %: {'within' if away <= WIDE else 'OUTSIDE'} the {told}, {side} the mean"
