"""How many units each group keeps so that the kept importance is largest under a cost (HALP, arXiv 2110.10811).

A multiple-choice knapsack: every group chooses one of its allowed widths; the value of a width is the sum of the
scores it keeps (the most important units stay, so the order inside a group is respected), its cost comes from the
caller's function of all widths. Latency is a staircase: within a step more channels cost nothing, so a whole step goes
or none of it, and a narrower layer may even cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from flatcompress.knapsack import best_choice
from flatcompress.prune.dependency.groups import Group
from flatcompress.prune.ranking import Limits

Gone = list[int]  # units removed per group
_BINS = 2000


def _options(groups: Sequence[Group], limits: Limits, already: Gone) -> list[list[int]]:
    """Allowed numbers of removed units per group, fewest first; what is gone stays gone."""
    result = []
    for group, gone in zip(groups, already, strict=True):
        step, least = limits.step(group), limits.least(group)
        widths = [k for k in range(group.units, 0, -1) if k % step == 0 or k == group.units]
        allowed = [group.units - k for k in widths if k >= least and group.units - k >= gone]
        result.append(allowed or [gone])
    return result


def _kept_value(scores: Tensor, gone: Sequence[int]) -> np.ndarray:
    ordered = np.sort(scores.double().numpy())
    lost = np.concatenate([[0.0], ordered.cumsum()])
    return ordered.sum() - lost[list(gone)]


def solve(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    limits: Limits,
    cost: Callable[[Gone], float],
    limit: float,
    start: Gone,
    already: Gone,
    rounds: int = 3,
) -> Gone:
    """Units to remove per group so that ``cost`` of them is at most ``limit`` and the kept score is largest.

    ``start`` must meet the limit. Layers share costs (one's outputs are the next one's inputs), so each round prices
    every group with the others as they are, solves the knapsack, and takes the largest solution whose true cost fits.
    """
    options = _options(groups, limits, already)
    values = [_kept_value(s, o) for s, o in zip(scores, options, strict=True)]
    best, point = list(start), list(start)
    for _ in range(rounds):
        found = _one_round(options, values, cost, limit, point)
        if found is None or found == point:
            break
        point = found
        if _total(options, values, found) > _total(options, values, best):
            best = found
    return best


def cheapest(
    groups: Sequence[Group], limits: Limits, cost: Callable[[Gone], float], already: Gone, rounds: int = 3
) -> Gone:
    """Units to remove per group for about the smallest ``cost`` there is: group by group, until none helps.

    Not every layer at its floor: on a staircase a narrower layer can cost more.
    """
    options = _options(groups, limits, already)
    point = [allowed[-1] for allowed in options]
    for _ in range(rounds):
        before = list(point)
        for index, allowed in enumerate(options):
            prices = [cost([*point[:index], gone, *point[index + 1 :]]) for gone in allowed]
            point[index] = allowed[int(np.argmin(prices))]
        if point == before:
            break
    return point


def _total(options: list[list[int]], values: list[np.ndarray], gone: Gone) -> float:
    return float(sum(v[o.index(g)] if g in o else -np.inf for o, v, g in zip(options, values, gone, strict=True)))


def _one_round(
    options: list[list[int]], values: list[np.ndarray], cost: Callable[[Gone], float], limit: float, point: Gone
) -> Gone | None:
    prices = []
    for index, allowed in enumerate(options):
        row = np.array([cost([*point[:index], gone, *point[index + 1 :]]) for gone in allowed], dtype=float)
        prices.append(row - row.min())
    span = sum(row.max() for row in prices)
    if span <= 0:
        return [allowed[0] for allowed in options]
    whole = span <= _BINS and all(np.array_equal(row, row.round()) for row in prices)
    unit = 1.0 if whole else span / _BINS
    integers = [np.rint(row / unit).astype(int) for row in prices]
    capacity = int(sum(row.max() for row in integers))
    chosen = best_choice(values, integers, capacity)
    for budget in range(capacity, -1, -1):
        gone = [allowed[int(choice[budget])] for allowed, choice in zip(options, chosen, strict=True)]
        if cost(gone) <= limit:
            return gone
    return None
