"""Who gets how many bits: the cheapest allocation under a budget, exactly.

minimise sum_l cost_l(b_l) subject to sum_l price_l(b_l) <= budget is a multiple-choice knapsack, which
`flatcompress.knapsack.allocate` solves exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError, unknown
from flatcompress.graph import macs, trace
from flatcompress.knapsack import Table, allocate
from flatcompress.quant.placement import Settings, place
from flatcompress.quant.sensitivity import CHOICES, Loss, rounded_loss, sensitivities

UNITS = ("effective_bits", "bytes", "bops")
WORTHWHILE = 0.8
TRIES = 8  # allocations under a price of one's own, each with what the last one was over taken off


@dataclass(frozen=True)
class Price:
    """A price of one's own. ``each``: {layer: {bits: price}} of layers that may be free. ``total``: of a choice for the
    free layers, which may be more than its sum."""

    each: Table
    total: Callable[[dict[str, int]], float]


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
    price: Price | None = None,
    **settings: Any,
) -> dict[str, int]:
    """Bits per layer for `quantize`'s ``bits``, from the *float* model, under a budget.

    ``unit``: ``effective_bits`` (mean bits per weight over the layers that are free, so that 4.0 costs what uniform 4
    bit costs), ``bytes`` (of all quantized weights) or ``bops`` (multiply-accumulates x weight bits x activation bits,
    per sample, of all quantized layers). First and last layers keep ``first_last_bits``. ``loss``, ``choices``,
    ``kind``: see `sensitivities`. ``price``: in place of a unit's, which then is a name. ``settings``: as `quantize`
    (``activation_bits``, ``first_last_bits``, ``ignore`` ...).

    Errors of several layers do not add up as an allocation assumes, and training makes up for most of what is small.
    So with ``measured`` the layers get different bits only where the loss, measured with all of them rounded, then
    rises by at most ``WORTHWHILE`` of what it rises by with the same bits everywhere.
    """
    if price is None and unit not in UNITS:
        raise unknown("budget unit", unit, UNITS)
    chosen = Settings(**{**settings, "ignore": tuple(settings.get("ignore", ()))})
    rows, _, _ = place(trace(model, example_input), model, chosen)
    free = [r.name for r in rows if r.why == "weight_bits"]
    if not free:
        raise UserError("no layer is free to choose its bits: all are first, last, ignored or given.")
    if price is not None:
        found, uniform = _priced(sensitivities(model, loss, free, choices, kind, seed), price, budget, unit)
        return _worthwhile(model, loss, found, uniform if kind == "measured" else {})
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
    return _worthwhile(model, loss, found, uniform)


def _worthwhile(model: nn.Module, loss: Loss, found: dict[str, int], uniform: dict[str, int]) -> dict[str, int]:
    """``found``, or ``uniform`` where that costs hardly more loss."""
    if not uniform or found == uniform:
        return found
    start, different, alike = (rounded_loss(model, loss, bits) for bits in ({}, found, uniform))
    return uniform if different - start > WORTHWHILE * (alike - start) else found


def _priced(costs: Table, price: Price, budget: float, unit: str) -> tuple[dict[str, int], dict[str, int]]:
    """The allocation whose total price is within the budget, and the most bits alike that are (empty: none).

    What a choice takes beside its sum is taken off the budget, and what the last try was over.
    """
    prices = {name: {b: price.each[name][b] for b in row} for name, row in costs.items()}
    fewest = {name: min(row, key=lambda b: row[b]) for name, row in prices.items()}
    lowest, least = price.total(fewest), sum(min(row.values()) for row in prices.values())
    if lowest > budget:
        raise UserError(f"a budget of {budget:,.0f} {unit} is too low: the fewest bits everywhere take {lowest:,.0f}.")
    common = sorted(set.intersection(*(set(row) for row in prices.values())), reverse=True)
    alike = (dict.fromkeys(prices, b) for b in common)
    uniform = next((bits for bits in alike if price.total(bits) <= budget), {})
    limit = budget - (lowest - least)
    for _ in range(TRIES):
        found = allocate(costs, prices, max(limit, least))
        over = price.total(found) - budget
        if over <= 0:
            return found, uniform
        limit -= over
    return uniform or fewest, uniform


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
