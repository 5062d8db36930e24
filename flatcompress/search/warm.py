"""Where a search begins: points that sensitivities of layers and importances of groups say are good.

Bits come from the allocation that costs the least sensitivity within so many bits a weight, ratios from the one that
costs the least importance within so many channels' parameters, both exact (`flatcompress.knapsack`); a ladder of such
budgets, crossed, gives the points. Everything else is as the base recipe has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flatcompress import prune
from flatcompress.knapsack import allocate
from flatcompress.modules import evaluating
from flatcompress.quant.sensitivity import float_layers, sensitivities
from flatcompress.search.space import Parameter, Space, groups
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches
from flatcompress.yaml_source import parse_yaml

SAMPLES = 256
Show = Callable[[str], None]


def points(space: Space, run: RunContext, trained: bool, show: Show) -> list[dict[str, Any]]:
    """Up to ``warm_start`` points; ``run`` has the weights that every trial begins with, where it is ``trained``."""
    count = space.search.warm_start
    if not count:
        return []
    if not trained:
        show("warm start: no weights are trained before what varies: the same bits and ratios everywhere, in steps")
    bits, ratios = _ladder(space, run, trained, "bits", count), _ladder(space, run, trained, "ratios", count)
    plain = _as_in_recipe(space)
    found = []
    for i in range(count):
        j = _scattered(i, len(ratios))
        found.append({**plain, **(bits[i % len(bits)] if bits else {}), **(ratios[j] if ratios else {})})
    return list({json.dumps(p, sort_keys=True): p for p in found}.values())


def usual(space: Space) -> dict[str, Any]:
    """A point in the middle: every parameter as the base recipe has it, of layers and groups the most and the least."""
    found = _as_in_recipe(space)
    for p in space.parameters:
        if p.part is not None:
            found[p.name] = p.choices[-1]
    return found


def _scattered(i: int, n: int) -> int:
    """A walk over 0..n-1 that is unlike counting, so that few bits meet many channels and the other way round."""
    stride = next((s for s in (5, 3, 7, 2, 1) if n % s), 1) if n else 1
    return (i * stride + i // max(1, n)) % n if n else 0


def _ladder(space: Space, run: RunContext, trained: bool, last: str, count: int) -> list[dict[str, Any]]:
    """Allocations from cheap to dear for every per-layer or per-group key that ends in ``last``, as parameters."""
    steps: list[dict[str, Any]] = []
    keys = dict.fromkeys(p.key for p in space.parameters if p.part is not None and p.key.endswith(f".{last}"))
    for key in keys:
        mine = [p for p in space.parameters if p.key == key]
        costs, prices = _tables(key, mine, space, run, trained)
        least, most = (sum(pick(row.values()) for row in prices.values()) for pick in (min, max))
        for i in range(count):
            budget = least + (most - least) * i / max(1, count - 1) + 1e-9 * most
            chosen = allocate(costs, prices, budget)
            if len(steps) <= i:
                steps.append({})
            steps[i] |= {p.name: p.choices[chosen[str(p.part)]] for p in mine}
    return steps


def _tables(
    key: str, parameters: list[Parameter], space: Space, run: RunContext, trained: bool
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Cost and price of every choice (by its place) of every part."""
    choices = [json.loads(text) for text in parameters[0].choices]
    names = [str(p.part) for p in parameters]
    if key.endswith(".bits"):
        size = {n: m.weight.numel() for n, m in float_layers(run.model, names).items()}  # type: ignore[union-attr, operator]
        prices = {n: {i: float(size[n] * b) for i, b in enumerate(choices)} for n in names}
        if not trained:
            return {n: {i: float(size[n] * 4.0**-b) for i, b in enumerate(choices)} for n in names}, prices
        found = _sensitivities(run, names, choices)
        return {n: {i: found[n][b] for i, b in enumerate(choices)} for n in names}, prices
    by_name = dict(groups(key, run, space.base))
    prices = {n: {i: by_name[n].channels * (1 - s) for i, s in enumerate(choices)} for n in names}
    scores = prune.score([by_name[n] for n in names], "group_l2") if trained else [None] * len(names)
    costs = {n: _lost(found, by_name[n].channels, choices) for n, found in zip(names, scores, strict=True)}
    return costs, prices


def _lost(scores: Any, channels: int, shares: list[float]) -> dict[int, float]:
    """Importance that goes with each share of a group, as a share of the group's, times its channels."""
    if scores is None:
        return {i: channels * share**2 for i, share in enumerate(shares)}
    ordered = scores.double().clamp(min=0).sort().values
    total = float(ordered.sum()) or 1.0
    return {i: channels * float(ordered[: round(s * len(ordered))].sum()) / total for i, s in enumerate(shares)}


def _sensitivities(run: RunContext, names: list[str], choices: list[int]) -> Mapping[str, Mapping[int, float]]:
    x, y = train_batches(run, SAMPLES, SAMPLES)[0]
    with evaluating(run.model):
        return sensitivities(run.model, lambda: run.task.loss(run.model(x), y), names, choices, seed=run.seed)


def _as_in_recipe(space: Space) -> dict[str, Any]:
    """Every other parameter as the base recipe has it; the middle of what it may be where that is not in the range."""
    found = {}
    for p in space.parameters:
        if p.part is None:
            value = _looked_up(space.base, p.key)
            if p.choices:
                text = p.stored(value)
                found[p.name] = text if text in p.choices else p.choices[0]
            else:
                found[p.name] = _number(p, value)
    return found


def _number(p: Parameter, value: Any) -> float | int:
    low, high = p.range.low, p.range.high
    assert low is not None and high is not None
    if isinstance(value, str):
        value, _ = parse_yaml(value, p.key)
    if not isinstance(value, int | float) or not low <= value <= high:
        value = (low * high) ** 0.5 if p.range.log else (low + high) / 2
    if p.range.step is not None:
        value = low + round((value - low) / p.range.step) * p.range.step
    return min(high, round(value)) if p.range.whole else float(value)


def _looked_up(raw: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(raw, list):
            raw = raw[int(part)]
        elif isinstance(raw, dict):
            raw = raw.get(part)
        else:
            return None
    return raw
