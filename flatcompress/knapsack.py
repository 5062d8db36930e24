"""The multiple-choice knapsack: one choice per row, the best total within a budget.

`allocate` is exact for real prices and one budget: a dynamic programme over the rows whose states are prices already
paid, kept only while nothing cheaper is better, and dropped when even the fractional relaxation of the rows to come
cannot beat a solution in hand. `best_choice` gives the solution for every whole budget up to a capacity at once,
which a search needs whose true price is no sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from flatcompress.errors import UserError

Table = Mapping[str, Mapping[int, float]]


def allocate(costs: Table, prices: Table, budget: float) -> dict[str, int]:
    """The choice per layer with the least total cost whose total price is at most ``budget``; ties go to the cheaper.

    ``costs[layer][b]`` and ``prices[layer][b]`` have the same keys. UserError when not even the cheapest fits.

    >>> costs = {"a": {2: 9.0, 4: 1.0}, "b": {2: 2.0, 4: 1.5}}
    >>> allocate(costs, {"a": {2: 2, 4: 4}, "b": {2: 2, 4: 4}}, budget=6)
    {'a': 4, 'b': 2}
    """
    names = list(costs)
    least = sum(min(prices[n].values()) for n in names)
    if least > budget:
        raise UserError(f"the budget {budget:g} is below {least:g}, the price of the fewest bits everywhere.")
    bound = _Relaxation(costs, prices, names)
    best_cost, best = bound.greedy(budget)
    # price -> (cost, picks so far as a linked list)
    states: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]
    for i, name in enumerate(names):
        grown = []
        for price, cost, picks in states:
            for choice in costs[name]:
                paid, spent = price + prices[name][choice], cost + costs[name][choice]
                if spent + bound.rest(i + 1, budget - paid) <= best_cost * (1 + 1e-12) + 1e-300:
                    grown.append((paid, spent, (choice, picks)))
        states = _undominated(grown)
    for _, cost, picks in states:
        if cost < best_cost or best is None:
            best_cost, best = cost, _unlinked(picks, names)
    assert best is not None
    return best


def _undominated(states: list[tuple[float, float, Any]]) -> list[tuple[float, float, Any]]:
    """Only states that cost less than every state with a price as low."""
    kept: list[tuple[float, float, Any]] = []
    for state in sorted(states, key=lambda s: (s[0], s[1])):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _unlinked(picks: Any, names: list[str]) -> dict[str, int]:
    chosen = []
    while picks is not None:
        choice, picks = picks
        chosen.append(choice)
    return dict(zip(names, reversed(chosen)))


class _Relaxation:
    """A lower bound on the layers i, i+1, ...: each may mix its choices along the convex hull of (price, cost)."""

    def __init__(self, costs: Table, prices: Table, names: list[str]) -> None:
        self.names, self.costs, self.prices = names, costs, prices
        self.hulls = [_hull(prices[n], costs[n]) for n in names]
        # steps along the hulls, steepest first: (slope, price, gain, layer)
        steps = [
            ((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], a[1] - b[1], i)
            for i, hull in enumerate(self.hulls)
            for a, b in pairwise(hull)
        ]
        self.steps = sorted(steps)
        self.base = [(sum(h[0][0] for h in self.hulls[i:]), sum(h[0][1] for h in self.hulls[i:]))
                     for i in range(len(names) + 1)]  # fmt: skip

    def rest(self, start: int, budget: float) -> float:
        """The least cost of layers ``start``.. within ``budget`` if choices could be mixed; inf when none fits."""
        price, cost = self.base[start]
        left = budget - price
        if left < -1e-9:
            return float("inf")
        for slope, step, gain, layer in self.steps:
            if layer < start:
                continue
            if step > left:
                return cost + slope * left
            left, cost = left - step, cost - gain
        return cost

    def greedy(self, budget: float) -> tuple[float, dict[str, int] | None]:
        """Whole steps, steepest first, skipping what does not fit: the solution to beat."""
        left = budget - self.base[0][0]
        level = [0] * len(self.hulls)
        blocked: set[int] = set()
        for _, step, _, layer in self.steps:
            if layer in blocked:
                continue
            if step > left + 1e-9:
                blocked.add(layer)
                continue
            left, level[layer] = left - step, level[layer] + 1
        picks = {n: self.hulls[i][level[i]][2] for i, n in enumerate(self.names)}
        return sum(self.costs[n][b] for n, b in picks.items()), picks


def _hull(prices: Mapping[int, float], costs: Mapping[int, float]) -> list[tuple[float, float, int]]:
    """The lower convex hull of one layer's (price, cost) points, from the lowest price on, while cost falls."""
    hull: list[tuple[float, float, int]] = []
    for price, cost, choice in sorted((float(prices[b]), float(costs[b]), b) for b in costs):
        if hull and (cost >= hull[-1][1] or price == hull[-1][0]):
            continue
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], (price, cost, choice)):
            hull.pop()
        hull.append((price, cost, choice))
    return hull


def _turns_up(a: tuple[float, float, int], b: tuple[float, float, int], c: tuple[float, float, int]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def best_choice(values: Sequence[np.ndarray], costs: Sequence[np.ndarray], capacity: int) -> list[np.ndarray]:
    """Dynamic programme over groups: option of every group for every integer budget up to ``capacity``.

    ``values[g][o]``, ``costs[g][o]`` (integers >= 0) describe option o of group g. Returns per group the chosen option
    [capacity + 1], already traced back; -1 where nothing fits.
    """
    best = np.zeros(capacity + 1)
    choices = []
    for value, cost in zip(values, costs, strict=True):
        table = np.full((len(value), capacity + 1), -np.inf)
        for option, (gain, price) in enumerate(zip(value, cost, strict=True)):
            if price <= capacity:
                table[option, price:] = best[: capacity + 1 - price] + gain
        choices.append(table.argmax(axis=0))
        best = table.max(axis=0)
    return _trace_back(choices, costs, best)


def _trace_back(choices: list[np.ndarray], costs: Sequence[np.ndarray], best: np.ndarray) -> list[np.ndarray]:
    left = np.arange(len(best))
    fits = np.isfinite(best)
    chosen: list[np.ndarray] = []
    for choice, cost in zip(reversed(choices), reversed(costs), strict=True):
        option = choice[np.where(fits, left, 0)]
        left = np.where(fits, left - np.asarray(cost)[option], 0)
        chosen.append(np.where(fits, option, -1))
    return chosen[::-1]
