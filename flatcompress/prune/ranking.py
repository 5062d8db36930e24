"""Which units go first: scopes that are ranked together, floors, and channel counts that run fast."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.prune.dependency.groups import Group
from flatcompress.registry import Registry

RANKINGS = Registry("ranking")


def global_scope(groups: Sequence[Group]) -> list[list[int]]:
    """All groups in one ranking."""
    return [list(range(len(groups)))]


def uniform_scope(groups: Sequence[Group]) -> list[list[int]]:
    """Every group on its own: the same share everywhere."""
    return [[i] for i in range(len(groups))]


def isomorphic_scope(groups: Sequence[Group]) -> list[list[int]]:
    """Groups of the same topology together (arXiv 2407.04616)."""
    scopes: dict[object, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        scopes[group.topology].append(index)
    return list(scopes.values())


RANKINGS.add("global", global_scope, "all groups compete, with a floor per group")
RANKINGS.add("uniform", uniform_scope, "the same share of every group")
RANKINGS.add("isomorphic", isomorphic_scope, "groups of the same structure compete", "2407.04616")


FLOOR = 0.1  # share of a group that stays where nothing is said


@dataclass(frozen=True)
class Limits:
    """What a ranking must respect.

    ``ranking``: global | uniform | isomorphic. ``round_to``: kept channels are multiples of it; None chooses 8, 4, 2 or
    1 per group, the largest that leaves at least 8 steps (so 64 channels and more end in multiples of 8, and a
    16-channel layer can still lose 2). ``min_channels`` and ``floor`` (a share of the group) are always kept; None is
    `FLOOR`, and under a ratio at least half of the share that the ratio leaves (`for_ratio`): a global ranking that
    goes by rounding must not leave a residual stream 2 of 16 channels while every other layer keeps 8.
    """

    ranking: str = "global"
    round_to: int | None = None
    min_channels: int = 1
    floor: float | None = None

    def __post_init__(self) -> None:
        _ = RANKINGS[self.ranking]
        if self.round_to is not None and self.round_to < 1:
            raise UserError(f"round_to must be at least 1, found {self.round_to}.")
        if self.min_channels < 1:
            raise UserError(f"min_channels must be at least 1, found {self.min_channels}: no layer may be emptied.")
        if self.floor is not None and not 0 <= self.floor < 1:
            raise UserError(f"floor is a share of each group in [0, 1), found {self.floor}.")

    def step(self, group: Group) -> int:
        """Units between two allowed widths of ``group``."""
        if group.kind == "heads":
            return 1
        per_unit = max(1, group.channels // group.units)
        if self.round_to is not None:
            return self.round_to // math.gcd(self.round_to, per_unit)
        return next(s for s in (8, 4, 2, 1) if s == 1 or group.units >= 8 * s)

    def for_ratio(self, ratio: float) -> Limits:
        """These limits with the floor that None stands for when ``ratio`` of all channels is to go.

        >>> Limits().for_ratio(0.5).floor, Limits().for_ratio(0.9).floor, Limits(floor=0.0).for_ratio(0.5).floor
        (0.25, 0.1, 0.0)
        """
        return self if self.floor is not None else replace(self, floor=max(FLOOR, (1 - ratio) / 2))

    def least(self, group: Group) -> int:
        """Units of ``group`` that must stay."""
        per_unit = 1 if group.kind == "heads" else max(1, group.channels // group.units)
        floor = FLOOR if self.floor is None else self.floor
        least = max(1, math.ceil(self.min_channels / per_unit), math.ceil(floor * group.units - 1e-9))
        step = self.step(group)
        return min(group.units, math.ceil(least / step) * step)


@dataclass(frozen=True)
class _Rung:
    """``units`` of ``group`` that go together once ``share`` of the scope's channels is to go."""

    share: float
    group: int
    units: int


class Ladder:
    """All removals in order: inside a scope the least important block of units goes first, scopes in step.

    ``keep`` marks units that are already gone: they always go first, so a later cut contains an earlier one. Shares
    are counted in channels, so an attention head weighs as much as all of its channels.
    """

    def __init__(
        self, groups: Sequence[Group], scores: Sequence[Tensor], limits: Limits, keep: Sequence[Tensor] | None = None
    ) -> None:
        self.groups = list(groups)
        gone = [~k for k in keep] if keep is not None else [torch.zeros(g.units, dtype=torch.bool) for g in groups]
        ranked = [s.float().masked_fill(g, -math.inf) for s, g in zip(scores, gone, strict=True)]
        self._order = [s.argsort(stable=True) for s in ranked]
        self._size = [group.channels / group.units for group in self.groups]
        self.rungs: list[_Rung] = []
        for scope in RANKINGS[limits.ranking](self.groups):
            self.rungs += self._scope_rungs(scope, ranked, limits)
        self.rungs.sort(key=lambda rung: rung.share)

    def _scope_rungs(self, scope: list[int], ranked: list[Tensor], limits: Limits) -> list[_Rung]:
        blocks = [(rank, i, units) for i in scope for rank, units in self._blocks(i, ranked[i], limits)]
        blocks.sort(key=lambda block: block[0])  # stable: ties stay in group order
        total = sum(self.groups[i].channels for i in scope)
        rungs, done = [], 0.0
        for _, index, units in blocks:
            size = units * self._size[index]
            rungs.append(_Rung((done + size / 2) / total, index, units))
            done += size
        return rungs

    def _blocks(self, index: int, scores: Tensor, limits: Limits) -> list[tuple[float, int]]:
        """(score, units) of the removable blocks of one group, least important first."""
        group, step = self.groups[index], limits.step(self.groups[index])
        ordered = scores[self._order[index]].tolist()
        blocks, start, left, least = [], 0, group.units, limits.least(group)
        while left > least:
            size = min(left % step or step, left - least)
            part = ordered[start : start + size]
            # A block that is half gone already must go on going: its least score decides, the mean otherwise.
            blocks.append((part[0] if part[0] == -math.inf else sum(part) / size, size))
            start, left = start + size, left - size
        return blocks

    @property
    def total(self) -> int:
        """Channels of all groups."""
        return sum(group.channels for group in self.groups)

    def first(self, count: int) -> list[int]:
        """Units to remove from every group when the first ``count`` rungs go."""
        gone = [0] * len(self.groups)
        for rung in self.rungs[:count]:
            gone[rung.group] += rung.units
        return gone

    def at_share(self, share: float) -> list[int]:
        """Units to remove from every group so that each scope loses the channels nearest to ``share``."""
        return self.first(sum(rung.share <= share + 1e-9 for rung in self.rungs))

    def removed_share(self, gone: Sequence[int]) -> float:
        """The share of all channels that ``gone`` units per group are."""
        return sum(n * size for n, size in zip(gone, self._size, strict=True)) / max(1, self.total)

    def keep(self, gone: Sequence[int]) -> list[Tensor]:
        """Bool [units] per group with the ``gone[i]`` least important units of group i False."""
        result = []
        for group, order, count in zip(self.groups, self._order, gone, strict=True):
            mask = torch.ones(group.units, dtype=torch.bool)
            mask[order[:count]] = False
            result.append(mask)
        return result

    def smallest(self, fits: Callable[[Sequence[int]], bool]) -> list[int] | None:
        """The shortest prefix of removals that ``fits`` (bisected, so it should stay true once it is); None if none."""
        at = bisect_left(range(len(self.rungs) + 1), True, key=lambda count: fits(self.first(count)))
        return None if at > len(self.rungs) else self.first(at)
