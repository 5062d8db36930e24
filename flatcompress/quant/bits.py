"""Who gets how many bits: the cheapest allocation under a budget, exactly.

minimise sum_l cost_l(b_l) subject to sum_l price_l(b_l) <= budget is a multiple-choice knapsack, which
`flatcompress.knapsack.allocate` solves exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    ``unit``: ``effective_bits`` (mean bits per weight over the layers that are free, so that 4.0 costs what uniform 4
    bit costs), ``bytes`` (of all quantized weights) or ``bops`` (multiply-accumulates x weight bits x activation bits,
    per sample, of all quantized layers). First and last layers keep ``first_last_bits``. ``loss``, ``choices``,
    ``kind``: see `sensitivities`. ``settings``: as `quantize` (``activation_bits``, ``first_last_bits``, ``ignore``
    ...).

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
