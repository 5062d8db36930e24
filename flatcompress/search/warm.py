"""Where a search begins: points that sensitivities of layers and importances of groups say are good.

Bits come from the allocation that costs the least sensitivity within so many bits a weight, ratios from the one that
costs the least importance within so many channels' parameters, both exact (`flatcompress.knapsack`); a ladder of such
budgets, crossed, gives the points. Everything else is, in every other point, as the user's own points (`given`) have
it, in turn, or, where there are none, as the base recipe does; in the points between it is spread evenly over the space
(a Latin hypercube), or the sampler would have nothing to learn of it from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from flatcompress import prune
from flatcompress.knapsack import allocate
from flatcompress.modules import evaluating
from flatcompress.quant.sensitivity import float_layers, sensitivities
from flatcompress.search import given
from flatcompress.search.space import Parameter, Space, groups
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches

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
    plain, spread = _settings(space), _spread(space, count // 2)
    found = []
    for i in range(count):
        j = _scattered(i, len(ratios))
        setting = spread[i // 2] if i % 2 else plain[i // 2 % len(plain)]
        found.append({**setting, **(bits[i % len(bits)] if bits else {}), **(ratios[j] if ratios else {})})
    return list({json.dumps(p, sort_keys=True): p for p in found}.values())


def _settings(space: Space) -> list[dict[str, Any]]:
    """Everything that is of no layer or group: as in the user's own points, each once, else as in the base recipe."""
    names = [p.name for p in space.parameters if p.part is None]
    own = [{name: point[name] for name in names} for point in given.points(space)]
    return list({json.dumps(s, sort_keys=True): s for s in own}.values()) or [_as_in_recipe(space)]


def _spread(space: Space, count: int) -> list[dict[str, Any]]:
    """``count`` settings of what is of no layer or group: of each parameter every choice as often, shuffled."""
    draw, found = random.Random(space.search.seed), [dict[str, Any]() for _ in range(count)]
    for p in space.parameters:
        if p.part is None:
            first = draw.randrange(len(p.choices) or 1)
            at = draw.sample(range(count), count)
            for point, i in zip(found, at, strict=True):
                point[p.name] = p.choices[(first + i) % len(p.choices)] if p.choices else _between(p, (i + 0.5) / count)
    return found


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
    """Every other parameter as the base recipe has it; the first or the middle value where the space has not that."""
    known = given.as_in(space, space.base)
    others = [p for p in space.parameters if p.part is None]
    return {
        p.name: known[p.name] if p.name in known else p.choices[0] if p.choices else _between(p, 0.5) for p in others
    }


def _between(p: Parameter, share: float) -> float | int:
    """The number that is so far into the range."""
    low, high = p.range.low, p.range.high
    assert low is not None and high is not None
    value = low ** (1 - share) * high**share if p.range.log else low + share * (high - low)
    if p.range.step is not None:
        value = low + min(round((value - low) / p.range.step), (high - low) // p.range.step) * p.range.step
    return min(high, round(value)) if p.range.whole else float(value)
