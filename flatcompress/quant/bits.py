"""Who gets how many bits: the cheapest allocation under a budget, exactly.

minimise sum_l cost_l(b_l) subject to sum_l price_l(b_l) <= budget is a multiple-choice knapsack. `allocate` solves it
exactly by dynamic programming over the layers: a state is a price already paid, kept only while nothing cheaper is
better, and dropped when even the fractional relaxation of the layers to come cannot beat a solution in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError, unknown
from flatcompress.graph import macs, trace
from flatcompress.quant.placement import Settings, place
from flatcompress.quant.sensitivity import CHOICES, Loss, rounded_loss, sensitivities

UNITS = ("effective_bits", "bytes", "bops")
WORTHWHILE = 0.8
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


def auto_bits(
    model: nn.Module,
    loss: Loss,
    budget: float = 4.0,
    unit: str = "effective_bits",
    *,
    example_input: torch.Tensor,
    choices: Iterable[int] = CHOICES,
    kind: str = "measured",
    seed: int = 0,
    **settings: Any,
) -> dict[str, int]:
    """Bits per layer for `quantize`'s ``bits``, from the *float* model, under a budget.

    ``unit``: ``effective_bits`` (mean bits per weight over the layers that are free, so that 4.0 costs what uniform
    4 bit costs), ``bytes`` (of all quantized weights) or ``bops`` (multiply-accumulates x weight bits x activation
    bits, per sample, of all quantized layers). First and last layers keep ``first_last_bits``. ``loss``, ``kind``: see
    `sensitivities`. ``settings``: as `quantize` (``activation_bits``, ``first_last_bits``, ``ignore`` ...).

    Errors of several layers do not add up as an allocation assumes, and training makes up for most of what is small.
    So with ``measured`` the layers get different bits only where the loss, measured with all of them rounded, then
    rises by at most ``WORTHWHILE`` of what it rises by with the same bits everywhere.
    """
    if unit not in UNITS:
        raise unknown("budget unit", unit, UNITS)
    chosen = Settings(**{**settings, "ignore": tuple(settings.get("ignore", ()))})
    rows, _, _ = place(trace(model, example_input), model, chosen)
    free = [r.name for r in rows if r.why == "weight_bits"]
    if not free:
        raise UserError("no layer is free to choose its bits: all are first, last, ignored or given.")
    weigh = _weigher(model, unit, example_input, chosen)
    fixed = 0.0 if unit == "effective_bits" else sum(weigh(r.name, r.bits) for r in rows if r.name not in free)
    total = sum(_size(model, n) for n in free)
    limit = budget * total if unit == "effective_bits" else budget - fixed
    prices = {n: {b: weigh(n, b) for b in choices} for n in free}
    least = sum(min(p.values()) for p in prices.values())
    if limit < least:
        lowest = least / total if unit == "effective_bits" else least + fixed
        raise UserError(f"a budget of {budget:g} {unit} is too low: the fewest bits everywhere take {lowest:g}.")
    found = allocate(sensitivities(model, loss, free, choices, kind, seed), prices, limit)
    uniform = _uniform(prices, limit) if kind == "measured" else {}
    if not uniform or found == uniform:
        return found
    start, different, alike = (rounded_loss(model, loss, bits) for bits in ({}, found, uniform))
    return uniform if different - start > WORTHWHILE * (alike - start) else found


def _uniform(prices: Table, limit: float) -> dict[str, int]:
    """The most bits that every layer can have alike within ``limit``; empty when there are none."""
    common = set.intersection(*(set(row) for row in prices.values()))
    fitting = [b for b in common if sum(row[b] for row in prices.values()) <= limit * (1 + 1e-12)]
    return dict.fromkeys(prices, max(fitting)) if fitting else {}


def _size(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).weight.numel()  # type: ignore[union-attr, operator]


def _weigher(model: nn.Module, unit: str, example_input: torch.Tensor, settings: Settings) -> Any:
    """The price of a layer at b bits in ``unit``."""
    if unit == "effective_bits":
        return lambda name, bits: _size(model, name) * bits
    if unit == "bytes":
        return lambda name, bits: (_size(model, name) * bits + 7) // 8
    counts = macs(model, example_input)
    inputs = settings.activation_bits or 32
    return lambda name, bits: counts[name] * bits * inputs
