"""Sparsity regularizers of the prune stage: what draws channels to zero while the dense model still trains.

One is a compose function of the flat engine: it adds to the combined gradient once a step, so it works under any
flat method and never enters a perturbation's direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from flatcompress.prune import Group, regularizers


class SparsityRegularizer:
    """The regularizer ``kind`` on ``groups``; nothing happens before step ``start``.

    ``target()`` chooses, once, which units are to go at the end (bool per unit, True stays); one on whole groups
    ("group_norm") needs no target. State: the step counter and the target.
    """

    def __init__(
        self, kind: str, groups: Sequence[Group], strength: float, start: int, target: Callable[[], list[Tensor]]
    ) -> None:
        self.kind, self.groups, self.strength, self.start = kind, list(groups), strength, start
        self._choose = target
        self.steps = 0
        self.keep: list[Tensor] | None = None

    def compose(self, params: list[nn.Parameter], probes: Any, combined: list[Tensor | None]) -> None:
        """Add the regularizer's gradient to ``combined``, in place."""
        self.steps += 1
        if self.kind != "group_norm":
            if self.steps <= self.start:
                return
            if self.keep is None:
                self.keep = self._choose()
        before = [p.grad for p in params]
        for p, g in zip(params, combined, strict=True):
            p.grad = g
        try:
            self._add()
        finally:
            for p, g in zip(params, before, strict=True):
                p.grad = g

    def _add(self) -> None:
        if self.kind == "group_norm":
            regularizers.group_norm_(self.groups, self.strength)
            return
        assert self.keep is not None
        if self.kind == "mask":
            regularizers.mask_sparsity_(self.groups, self.keep, self.strength)
        else:
            grown = regularizers.growing_strength(self.steps - self.start - 1, self.strength)
            regularizers.growing_(self.groups, self.keep, grown)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and the chosen units."""
        return {"steps": self.steps, "keep": self.keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.steps = int(state["steps"])
        self.keep = None if state["keep"] is None else [k.bool() for k in state["keep"]]
