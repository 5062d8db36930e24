"""Coupled channels: one index space that importance, radius, masks and removal share (arXiv 2301.12900).

A *unit* is what can be removed on its own: one channel together with everything tied to it by residual sums,
concatenations, depthwise and grouped convolutions; or one attention head. A *group* is a set of units that
live in the same layers. A *member* says where: for every channel of one axis of one layer, which unit owns it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatcompress.prune.dependency import axes


@dataclass(frozen=True, eq=False)
class Member:
    """One channel axis of one layer; ``owner`` [channels] holds the unit of each channel, -1 for other groups'."""

    name: str
    module: nn.Module
    axis: str
    owner: Tensor

    def sum_units(self, values: Tensor, units: int) -> Tensor:
        """Sum a value per channel [channels] into a value per unit [units]."""
        owner = self.owner.to(values.device)
        mine = owner >= 0
        return values.new_zeros(units).index_add_(0, owner[mine], values[mine])

    def spread(self, per_unit: Tensor, other: float | bool) -> Tensor:
        """A value per unit [units] as a value per channel [channels]; ``other`` where another group owns it."""
        owner = self.owner.to(per_unit.device)
        return torch.where(owner >= 0, per_unit[owner.clamp(min=0)], torch.as_tensor(other, dtype=per_unit.dtype))


@dataclass(frozen=True, eq=False)
class Group:
    """Units [0, units) coupled through ``members``.

    ``counts``: (module, attribute, value per kept unit) to set again after a cut, such as ``num_heads``.
    ``reason``: why nothing here may be cut, or None. ``through``: operations on the way, for messages.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    kind: str = "channels"
    counts: tuple[tuple[str, str, int], ...] = ()
    reason: str | None = None
    through: tuple[str, ...] = ()

    @property
    def outs(self) -> tuple[Member, ...]:
        """Members whose channels the layer itself produces (or treats one by one)."""
        return tuple(m for m in self.members if m.axis == axes.OUT)

    @property
    def channels(self) -> int:
        """Channels of the first producing layer that belong to this group; of heads, what the projection reads."""
        member = self.members[-1] if self.kind == "heads" else (self.outs or self.members)[0]
        return int((member.owner >= 0).sum())

    @property
    def topology(self) -> tuple[str, ...]:
        """What isomorphic ranking compares (arXiv 2407.04616): what the units are, and the kinds of the coupled layers.

        Widths and kernel sizes do not count. Heads never equal channels, though an MLP of a transformer has the same
        two Linear layers as an attention block: one is wide, the other is cut in pieces of a head.
        """
        return (self.kind, *sorted(f"{axes.layer_kind(m.module)} {m.axis}" for m in self.members))


@dataclass(frozen=True)
class Survey:
    """What can be cut (``groups``) and what cannot, each with its ``reason`` (``protected``)."""

    groups: list[Group]
    protected: list[Group]

    def explain(self) -> str:
        """One line per group: its units and layers, or why it is left alone."""
        lines = [f"{g.name}: {g.units} {g.kind} in {len(g.members)} layers" for g in self.groups]
        return "\n".join(lines + [f"{g.name}: not cut: {g.reason}" for g in self.protected])
