"""What a window of steps says of every scale: how disorderly its gradients are, and how often they oppose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcompress.randomness import generator

_COUNTERS = ("last_task", "last_smooth", "moves", "flips", "moves_smooth", "flips_smooth", "seen", "pairs", "opposed")
_SUMS = ("sum_task", "sum_smooth", "way", "path")
STANDING = 0.5  # a scale whose way over a window is a smaller share of its path stands


class Statistics:
    """Counters over one window, one entry per scale. ``task``, ``smooth``: the two gradients, [scales]."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.last: Tensor | None = None  # goes on from window to window: the step between two belongs to the second
        self.reset()

    def reset(self) -> None:
        """Begin a window."""
        self.state: dict[str, Tensor] = {name: torch.zeros(self.size, device=self.device) for name in _COUNTERS}
        self.state.update({n: torch.zeros(self.size, dtype=torch.float64, device=self.device) for n in _SUMS})

    def count(self, task: Tensor, smooth: Tensor, scales: Tensor | None = None) -> None:
        """Take in one step's gradients, and where the scales were then."""
        s = self.state
        if scales is not None:
            moved = torch.zeros_like(s["way"]) if self.last is None else scales.double() - self.last
            self.last = scales.double()
            s["way"] += moved
            s["path"] += moved.abs()
        signs = task.sign().float(), smooth.sign().float()
        for sign, key in zip(signs, ("task", "smooth")):
            tail = "" if key == "task" else "_smooth"
            last = s[f"last_{key}"]
            carried = torch.where(sign == 0, last, sign)
            product = carried * last
            s[f"moves{tail}"] += product != 0
            s[f"flips{tail}"] += product < 0
            s[f"last_{key}"] = carried
        s["seen"] += signs[0] != 0
        product = signs[0] * signs[1]
        s["pairs"] += product != 0
        s["opposed"] += product < 0
        s["sum_task"] += task
        s["sum_smooth"] += smooth

    @property
    def known(self) -> Tensor:
        """Fewer than two signs say nothing about order: such a scale (a dead quantizer) keeps its last decision."""
        return self.state["seen"] >= 2

    @property
    def disorder(self) -> Tensor:
        """Share of sign flips of the task gradient."""
        return self.state["flips"] / self.state["moves"].clamp_min(1)

    @property
    def disorder_smooth(self) -> Tensor:
        """The same of the gradient at the perturbed weights."""
        return self.state["flips_smooth"] / self.state["moves_smooth"].clamp_min(1)

    @property
    def conflict(self) -> Tensor:
        """Share of the steps in which the two oppose."""
        return self.state["opposed"] / self.state["pairs"].clamp_min(1)

    @property
    def travel(self) -> Tensor:
        """Way from begin to end as a share of the path: 1 for a scale that went one way, 0 for one that came back."""
        return self.state["way"].abs() / self.state["path"].clamp_min(torch.finfo(torch.float64).tiny)

    def columns(self, owner: Tensor) -> dict[str, Tensor]:
        """The three figures per quantizer: means over its scales."""
        return {
            "disorder": mean(self.disorder, self.known, owner),
            "disorder_smooth": mean(self.disorder_smooth, self.known, owner),
            "conflict": mean(self.conflict, self.state["pairs"] > 0, owner),
            "travel": mean(self.travel, self.state["path"] > 0, owner),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The counters."""
        found = {key: value.clone() for key, value in self.state.items()}
        return found if self.last is None else {**found, "last": self.last.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.reset()
        given = {key: value.clone().to(self.device) for key, value in state.items()}
        self.last = given.pop("last", None)
        self.state |= given


@dataclass(frozen=True)
class Policy:
    """Which groups of scales are frozen after a window; the switches are those of `ScaleConflict`."""

    K: int
    tau: float
    tau_kind: str
    mode: str
    seed: int = 0

    def frozen(self, found: Statistics, groups: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
        """(frozen, decided), bool [groups]: what is to be frozen, and where there was anything to decide by."""
        known = found.known
        disorder, opposed = mean(found.disorder, known, groups), mean(found.conflict, known, groups)
        decided = total(known.double(), groups) > 0
        measure = 1 - opposed if self.mode == "opposed" else disorder
        if self.mode == "random":
            drawn = torch.rand(len(disorder), dtype=torch.float64, generator=generator(self.seed, "freeze", window))
            measure = drawn.to(disorder.device)
        frozen = measure < self._threshold(measure, decided)
        if self.mode == "standing":
            frozen &= mean(found.travel, found.state["path"] > 0, groups).nan_to_num(0.0) < STANDING
        if self.mode == "gated":
            against = total(found.state["sum_task"] * found.state["sum_smooth"], groups) < 0
            frozen &= (opposed > 0.5) & against
        return frozen, decided

    def _threshold(self, disorder: Tensor, decided: Tensor) -> Tensor:
        if self.tau_kind == "absolute":
            return torch.full_like(disorder, self.tau)
        if self.tau_kind == "sigma":
            return torch.full_like(disorder, 0.5 - self.tau * 0.5 / math.sqrt(self.K - 1))
        # the k least disordered; a stable sort breaks ties by position, so the share is exact and repeatable
        order = torch.argsort(torch.where(decided, disorder, torch.full_like(disorder, math.inf)), stable=True)
        limit = torch.zeros_like(disorder)
        limit[order[: int(self.tau * int(decided.sum()) + 1e-9)]] = math.inf
        return limit


def total(values: Tensor, groups: Tensor) -> Tensor:
    """Sum of the values per group, in double precision."""
    size = int(groups.max()) + 1
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, groups, values.double())


def mean(values: Tensor, known: Tensor, groups: Tensor) -> Tensor:
    """Mean of the known values per group; NaN for a group without any."""
    weight = known.double()
    return total(torch.where(known, values.double(), torch.zeros_like(weight)), groups) / total(weight, groups)
