"""Pruning during training: at every event a few more channels are held at zero; at the end one physical cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.plan import Plan
from flatcompress.prune.budgets.choice import Budget, choose, settled
from flatcompress.prune.budgets.cost import CostModel
from flatcompress.prune.dependency.survey import survey
from flatcompress.prune.importance import IMPORTANCES, RunningScore, score
from flatcompress.prune.inputs import Example
from flatcompress.prune.masks import WeightMasks, enforce_, parse_pattern
from flatcompress.prune.oneshot import NothingPruned, nothing_pruned, require_groups
from flatcompress.prune.radius import Radius, adaptive_radius
from flatcompress.prune.ranking import Limits
from flatcompress.prune.schedule import left_after
from flatcompress.prune.soft import SoftMask, shrink


class ChannelSchedule:
    """Removes channels of ``model`` in ``events`` steps, one every ``every`` optimizer steps.

    In the training loop: `observe` after a backward (gradient scores are averaged between events, arXiv 2110.10811),
    the optimizer's step, then `step`. After the phase `shrink` cuts. `radius` is AdaSAP's, for the flat engine's ball.
    ``events`` may also be the very optimizer steps, counted from 1, and ``every`` says nothing then.
    ``kind``: exponential | cubic | one_shot, on what is left of the budget's measure.
    UserError at construction, with the model untouched: nothing can be pruned, or the budget is out of reach.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Example,
        budget: Budget | None = None,
        *,
        events: int | Sequence[int] = 10,
        every: int = 30,
        kind: str = "exponential",
        importance: str = "group_l2",
        limits: Limits | None = None,
        ignore: Sequence[str] = (),
        **options: Any,
    ) -> None:
        facts = IMPORTANCES[importance].facts
        if every < 1:
            raise UserError(f"prune events must be at least 1 step apart, found every={every}.")
        self.at = [every * (i + 1) for i in range(events)] if isinstance(events, int) else list(events)
        left_after(kind, 1.0, 0.5, 0, self.events)
        self.model, self.example_input = model, example_input
        self.budget, self.kind = budget or Budget(), kind
        self.limits = settled(limits, self.budget)
        self.importance, self.options = importance, options
        found = survey(model, example_input, ignore)
        require_groups(model, found)
        self.groups, self.protected = found.groups, found.protected
        self.mask = SoftMask(self.groups)
        self.steps = self.event = 0
        self.costs = None if self.budget.kind == "ratio" else CostModel(model, example_input)
        self._running = RunningScore(self.groups, importance, **options) if facts.needs_gradients else None
        self._check_reachable()

    def _check_reachable(self) -> None:
        # Whether a budget can be met depends on how many units may go, not on which.
        even = [torch.zeros(group.units) for group in self.groups]
        keep = choose(self.groups, even, self.budget, self.limits, costs=self.costs)
        if all(bool(units.all()) for units in keep):
            raise NothingPruned(nothing_pruned(self.budget))

    @property
    def events(self) -> int:
        """How many prune events there are."""
        return len(self.at)

    @property
    def done(self) -> bool:
        """All events have been."""
        return self.event >= self.events

    def observe(self) -> None:
        """Take in the gradients that are there now; nothing to do for scores that need none."""
        if self._running is not None:
            self._running.update()

    def scores(self) -> list[Tensor]:
        """Scores [units] per group of the weights as they are, or averaged since the last event."""
        if self._running is not None and self._running.count:
            return self._running.scores()
        return score(self.groups, self.importance, **self.options)

    def radius(
        self,
        params: Sequence[nn.Parameter],
        rho_min: float = 0.01,
        rho_max: float = 2.0,
        percentile: float | None = None,
        *,
        norm: str = "global",
    ) -> list[Radius]:
        """AdaSAP's radius per parameter from the scores that decide what goes; see `adaptive_radius`.

        Gradient scores are averages over earlier steps: since the last event, right after one until it. Before the
        first gradient all units get the middle radius. Removed units get 0.
        """
        scores: list[Tensor] | None = self.scores() if self._running is None else self._running.latest()
        if scores is None:
            scores = [torch.ones(group.units) for group in self.groups]
        return adaptive_radius(
            self.groups, scores, params, rho_min, rho_max, percentile, norm=norm, keep=self.mask.keep
        )

    def step(self) -> bool:
        """Call after each optimizer step: holds removed channels at zero; True where more were removed."""
        return self.advance(self.steps + 1)

    def advance(self, step: int) -> bool:
        """`step` for a loop that counts the optimizer steps itself, from 1."""
        self.steps = step
        self.mask.apply_()  # what is gone must not stand in the scores of what is left
        due = not self.done and step >= self.at[self.event]
        if due:
            self._remove(self.event + 1)
        return due

    def _remove(self, event: int) -> None:
        keep = self.kept_after(event)
        if keep is not None:
            self.mask.remove_(keep)
        self.event = event
        if self._running is not None:
            self._running.reset()

    def kept_after(self, event: int) -> list[Tensor] | None:
        """What prune event ``event`` (from 1) leaves, bool [units] per group; None while nothing is to go yet."""
        budget = self._target(event)
        return None if budget is None else self.choose(budget)

    def choose(self, budget: Budget) -> list[Tensor]:
        """The units that stay within ``budget``, bool [units] per group; removed ones stay removed."""
        return choose(self.groups, self.scores(), budget, self.limits, costs=self.costs, keep=self.mask.keep)

    def _target(self, event: int) -> Budget | None:
        """The budget of one event; None while there is nothing to remove yet."""
        if event >= self.events:
            return self.budget
        if self.budget.ratios is not None:
            return self._ratios_after(self.budget.ratios, event)
        if self.costs is None:
            ratio = 1 - left_after(self.kind, 1.0, 1 - self.budget.value, event, self.events)
            return Budget("ratio", ratio) if ratio > 0 else None
        dense = self.budget.measure(self.costs)(self.costs.dense)
        left = left_after(self.kind, dense, self.budget.limit(dense), event, self.events)
        return replace(self.budget, value=left, absolute=True)

    def _ratios_after(self, ratios: Mapping[str, float], event: int) -> Budget:
        """Every group on its own way to its ratio."""

        def now(share: float) -> float:
            return 1 - left_after(self.kind, 1.0, 1 - share, event, self.events)

        return replace(self.budget, value=now(self.budget.value), ratios={n: now(s) for n, s in ratios.items()})

    def finish(self) -> None:
        """Go to the final budget now, whatever events are missing."""
        if not self.done:
            self._remove(self.events)

    def shrink(self) -> Plan:
        """`finish`, check that cut and masked model agree, and cut; returns the plan. See `shrink`."""
        self.finish()
        return shrink(self.model, self.groups, self.mask, self.example_input)

    def state_dict(self) -> dict[str, Any]:
        """Counters, removed units and score averages: plain numbers and tensors."""
        running = None if self._running is None else self._running.state_dict()
        return {"steps": self.steps, "event": self.event, "mask": self.mask.state_dict(), "running": running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the middle of the phase, on a model that holds the weights of that moment."""
        self.steps, self.event = int(state["steps"]), int(state["event"])
        self.mask.load_state_dict(state["mask"])
        if self._running is not None and state["running"] is not None:
            self._running.load_state_dict(state["running"])


class WeightSchedule:
    """Single weights masked in ``events`` steps, one every ``every`` optimizer steps (arXiv 1710.01878).

    ``target`` is the final share of zeros; ``kind`` as for channels, cubic by default. N:M masks come all at once, at
    the first event, after the network has trained dense until then (arXiv 2104.08378). Call `step` after each
    optimizer step; the masks live in the model's buffers, so the state is a counter.
    """

    def __init__(
        self, masks: WeightMasks, target: float | None = None, *, events: int = 10, every: int = 30, kind: str = "cubic"
    ) -> None:
        left_after(kind, 1.0, 0.5, 0, events)
        if every < 1:
            raise UserError(f"prune events must be at least 1 step apart, found every={every}.")
        self._nm = parse_pattern(masks.pattern) is not None
        if not self._nm and (target is None or not 0 < target < 1):
            raise UserError(f"sparsity is the share of zero weights, above 0 and below 1; found {target}.")
        self.masks, self.target, self.kind = masks, target, kind
        self.events, self.every = (1 if self._nm else events), every
        self.steps = 0

    @property
    def done(self) -> bool:
        """All events have been."""
        return self.steps >= self.events * self.every

    def step(self) -> bool:
        """Hold masked weights at zero; True where more were masked."""
        self.steps += 1
        due = self.steps % self.every == 0 and self.steps <= self.events * self.every
        if due:
            event = self.steps // self.every
            left = 0.0 if self.target is None else left_after(self.kind, 1.0, 1 - self.target, event, self.events)
            self.masks.update(None if self._nm else 1 - left)
        else:
            enforce_(self.masks.model)
        return due

    def state_dict(self) -> dict[str, int]:
        """The step counter."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`; apply the masks' plan and load the model's state dict first."""
        self.steps = int(state["steps"])
