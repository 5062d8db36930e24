"""Budgets, not knobs: how small, fast or light the model must become, and which units that costs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.modules import check_patterns, matches
from flatcompress.prune.budgets.cost import Cost, CostModel, Widths
from flatcompress.prune.budgets.knapsack import cheapest, solve
from flatcompress.prune.dependency.groups import Group
from flatcompress.prune.ranking import Ladder, Limits

CostOf = Callable[[Sequence[int]], float]
KINDS = ("ratio", "macs", "params", "bytes", "cost")


@dataclass(frozen=True)
class Budget:
    """What must be met.

    ``kind`` ratio: ``value`` is the share of prunable units to remove, in (0, 1). macs, params, bytes, cost: at most
    ``value`` may be left; up to 1 as a share of the dense model, above 1 absolute. ``cost`` (kind cost) maps the
    widths of all layers ({name: Width(inputs, outputs, groups)}) to a number, such as milliseconds from a latency
    table; ``absolute`` says that ``value`` is absolute even below 1. ``weight_bits`` is for kind bytes. ``knapsack``:
    weigh importance against cost (`knapsack.solve`) instead of going down the ranking; None does so for kind cost only.
    Without it a cost gives back, group by group, what it can (`_given_back`): that suits one that is no sum, such as a
    peak of memory. ``called``: what messages call it, the kind by default; ``unmet``: what to say, for the narrowest
    widths there are, where the budget cannot be met. ``ratios`` (kind ratio): the share of each group that holds
    the named layer (or ``re:PATTERN``), which then is ranked on its own; ``value`` of every other group, may be 0.
    """

    kind: str = "ratio"
    value: float = 0.5
    cost: Cost | None = None
    weight_bits: float = 8
    absolute: bool = False
    knapsack: bool | None = None
    called: str = ""
    ratios: Mapping[str, float] | None = None
    unmet: Callable[[Widths], str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("pruning budget", self.kind, KINDS)
        object.__setattr__(self, "called", self.called or self.kind)
        if self.ratios is not None:
            self._check_ratios()
            return
        if self.kind == "ratio" and not 0 < self.value < 1:
            raise UserError(
                f"ratio is the share of channels to remove, above 0 and below 1; found {self.value}"
                + (" (that would empty every layer)." if self.value >= 1 else ".")
            )
        if self.value <= 0:
            raise UserError(f"a {self.called} budget must be above 0, found {self.value}.")
        if (self.kind == "cost") != (self.cost is not None):
            raise UserError("a budget of kind 'cost' needs a cost function, and only that kind takes one.")

    def _check_ratios(self) -> None:
        if self.kind != "ratio":
            raise UserError(f"ratios go with a budget of kind ratio, not {self.kind!r}.")
        for name, share in [*(self.ratios or {}).items(), ("ratio", self.value)]:
            if not 0 <= share < 1:
                raise UserError(f"ratios: {name}: the share of channels to remove, from 0 to below 1; found {share}.")

    @property
    def weighs(self) -> bool:
        """Importance is weighed against cost."""
        return self.kind != "ratio" and (self.kind == "cost" if self.knapsack is None else self.knapsack)

    def measure(self, costs: CostModel) -> Cost:
        """The function of the widths that the budget bounds."""
        if self.kind == "bytes":
            return lambda widths: costs.bytes(widths, self.weight_bits)
        if self.kind == "cost":
            assert self.cost is not None
            return self.cost
        return costs.macs if self.kind == "macs" else costs.params

    def limit(self, dense: float) -> float:
        """The absolute bound, given what the dense model costs."""
        return self.value if self.absolute or self.value > 1 else self.value * dense


def settled(limits: Limits | None, budget: Budget) -> Limits:
    """``limits``, or the default ones, with the floor that goes with ``budget``."""
    limits = limits or Limits()
    if budget.ratios is not None:
        return replace(limits, ranking="uniform")
    return limits.for_ratio(budget.value) if budget.kind == "ratio" else limits


def choose(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    budget: Budget,
    limits: Limits | None = None,
    *,
    costs: CostModel | None = None,
    keep: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Which units stay, bool [units] per group: the least important ones go until ``budget`` is met.

    ``scores``: [units] per group of ``groups``. Uniform and isomorphic rankings are never weighed against cost.
    ``costs`` is needed for every budget but a ratio. ``keep``: units removed before, which go first. UserError: the
    budget cannot be met within ``limits`` (the message says the smallest that can).
    """
    limits = settled(limits, budget)
    ladder = Ladder(groups, scores, limits, keep)
    if budget.ratios is not None:
        gone = _for_ratios(ladder, budget)
    elif budget.kind == "ratio":
        gone = _for_ratio(ladder, budget.value)
    elif budget.weighs and limits.ranking == "global":
        gone = _knapsack(ladder, scores, limits, budget, costs, keep)
    else:
        gone = _for_cost(ladder, budget, costs)
        if budget.kind == "cost" and budget.knapsack is False and limits.ranking == "global":
            gone = _given_back(ladder, budget, costs, gone, keep)
    chosen = ladder.keep(gone)
    return chosen if keep is None else [now & before for now, before in zip(chosen, keep, strict=True)]


def _for_ratio(ladder: Ladder, ratio: float) -> list[int]:
    most = ladder.removed_share(ladder.first(len(ladder.rungs)))
    if ratio > most + 1e-9:
        raise UserError(
            f"ratio {ratio:g} cannot be met: at most {most:.4g} of the channels may go within round_to, min_channels "
            "and floor. Lower the ratio or loosen those."
        )
    return ladder.at_share(ratio)


def shares(groups: Sequence[Group], budget: Budget) -> list[float]:
    """The share of each group that ``budget.ratios`` asks to remove; of several that fit a group the first counts.

    UserError for a name or pattern that no group's layers have.
    """
    ratios = budget.ratios or {}
    names = [[member.name for member in group.outs or group.members] for group in groups]
    check_patterns("ratios", list(ratios), [name for found in names for name in found])
    return [
        next((s for pattern, s in ratios.items() if any(matches(pattern, n) for n in found)), budget.value)
        for found in names
    ]


def _for_ratios(ladder: Ladder, budget: Budget) -> list[int]:
    wanted = shares(ladder.groups, budget)
    most = [0] * len(ladder.groups)
    gone = [0] * len(ladder.groups)
    for rung in ladder.rungs:
        most[rung.group] += rung.units
        if rung.share <= wanted[rung.group] + 1e-9:
            gone[rung.group] += rung.units
    for group, share, limit in zip(ladder.groups, wanted, most, strict=True):
        if share > limit / group.units + 1e-9:
            raise UserError(
                f"ratios: {share:g} of {group.name} cannot go: at most {limit / group.units:.4g} of its channels may, "
                "within round_to, min_channels and floor. Lower it or loosen those."
            )
    return gone


def _for_cost(ladder: Ladder, budget: Budget, costs: CostModel | None) -> list[int]:
    cost_of, dense, limit = _bounded(ladder, budget, costs)
    gone = ladder.smallest(lambda removed: cost_of(removed) <= limit)
    if gone is None:
        raise UserError(_too_small(ladder, budget, costs, (cost_of, dense, limit), ladder.first(len(ladder.rungs))))
    return gone


def _given_back(
    ladder: Ladder, budget: Budget, costs: CostModel | None, gone: Sequence[int], keep: Sequence[Tensor] | None
) -> list[int]:
    """``gone`` with as much given back to each group as the limit allows, the group that lost its best units first.

    Going down the ranking takes from every layer; a peak of memory is a matter of a few. keep: units gone before.
    """
    cost_of, _, limit = _bounded(ladder, budget, costs)
    found, lost = list(gone), [rung.group for rung in reversed(ladder.rungs) if gone[rung.group]]
    for group in dict.fromkeys(lost):
        before = int((~keep[group]).sum()) if keep is not None else 0
        steps = accumulate((rung.units for rung in ladder.rungs if rung.group == group), initial=0)
        choices = [step for step in steps if before <= step <= gone[group]]
        least = bisect_left(choices, True, key=lambda step: cost_of(_with(found, group, step)) <= limit)
        found[group] = choices[least] if least < len(choices) else found[group]
    return found


def _with(gone: Sequence[int], group: int, units: int) -> list[int]:
    return [*gone[:group], units, *gone[group + 1 :]]


def _bounded(ladder: Ladder, budget: Budget, costs: CostModel | None) -> tuple[CostOf, float, float]:
    """The cost of removing so many units of every group, what the dense model costs, and the bound."""
    if costs is None:
        raise UserError(f"a {budget.kind} budget needs a CostModel.")
    measure = budget.measure(costs)
    dense = measure(costs.dense)
    widths = costs.by_count(ladder.groups)
    known: dict[tuple[int, ...], float] = {}

    def cost_of(gone: Sequence[int]) -> float:
        key = tuple(gone)
        if key not in known:
            known[key] = measure(widths(gone))
        return known[key]

    return cost_of, dense, budget.limit(dense)


def _knapsack(
    ladder: Ladder,
    scores: Sequence[Tensor],
    limits: Limits,
    budget: Budget,
    costs: CostModel | None,
    keep: Sequence[Tensor] | None,
) -> list[int]:
    cost_of, dense, limit = _bounded(ladder, budget, costs)
    already = [int((~k).sum()) for k in keep] if keep is not None else [0] * len(ladder.groups)
    start = ladder.smallest(lambda removed: cost_of(removed) <= limit)
    if start is None:
        start = cheapest(ladder.groups, limits, cost_of, already)
        if cost_of(start) > limit:
            raise UserError(_too_small(ladder, budget, costs, (cost_of, dense, limit), start))
    return solve(ladder.groups, scores, limits, cost_of, limit, start, already)


def _too_small(
    ladder: Ladder, budget: Budget, costs: CostModel | None, bounds: tuple[CostOf, float, float], gone: Sequence[int]
) -> str:
    """gone: what goes for the smallest cost there is."""
    if budget.unmet is not None and costs is not None:
        return budget.unmet(costs.by_count(ladder.groups)(gone))
    cost_of, dense, limit = bounds
    least, share = cost_of(gone), not budget.absolute and budget.value <= 1
    asked, can = (f"{budget.value:g}", f"{least / dense:.4g}") if share else (f"{limit:g}", f"{least:.6g}")
    return (
        f"{budget.called} {asked} cannot be met: the smallest that can is {can} (dense: {dense:.6g}), with every layer "
        "as narrow as helps. Raise the budget, or lower round_to, min_channels or floor."
    )
