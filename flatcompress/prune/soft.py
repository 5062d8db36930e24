"""Channels removed softly: zeroed and held at zero while training goes on, cut once at the end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import RunError, UserError
from flatcompress.plan import Plan
from flatcompress.prune.channels import Surgery, channel_count, head_counts, keep_channels, plan_of
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group
from flatcompress.prune.dependency.survey import cut_equals_mask
from flatcompress.prune.inputs import Example

NARROW = 0.2


class SoftMask:
    """Which units are still there, and the means to hold the others at exactly zero.

    ``keep``: bool [units] per group. A removed unit has every slice zero that belongs to it, in the layers that
    produce it and in those that consume it (BatchNorm's gamma and beta too), so it adds nothing in train or eval
    mode, whatever activation lies between, and the cut model computes the same.
    """

    def __init__(self, groups: Sequence[Group], keep: Sequence[Tensor] | None = None) -> None:
        self.groups = list(groups)
        self.keep = [torch.ones(g.units, dtype=torch.bool) for g in self.groups]
        self._holes: list[tuple[nn.Module, str, int, Tensor]] = []
        if keep is not None:
            self.remove_(keep)

    @property
    def channels(self) -> tuple[int, int]:
        """(kept, total) channels; an attention head counts as all of its channels."""
        return channel_count(self.groups, self.keep)

    def remove_(self, keep: Sequence[Tensor]) -> None:
        """Remove what ``keep`` (bool [units] per group) leaves out, and zero it. A removed unit never comes back."""
        self.keep = [old & new.cpu() for old, new in zip(self.keep, keep, strict=True)]
        self._holes = []
        for group, units in zip(self.groups, self.keep, strict=True):
            if bool(units.all()):
                continue
            for member in group.members:
                drop = axes.local(member.module, member.axis, ~member.spread(units, True))
                for name, parameter, dim in axes.parameters(member.module, member.axis):
                    self._holes.append((member.module, name, dim, drop.to(parameter.device)))
        self.apply_()

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the removed units' weights; call after every optimizer step (momentum and decay would move them)."""
        for module, name, dim, drop in self._holes:
            axes.fill_(getattr(module, name), dim, drop)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the removed units' gradients; call after a backward, so that norms and momentum do not see them."""
        for module, name, dim, drop in self._holes:
            gradient = getattr(module, name).grad
            if gradient is not None:
                axes.fill_(gradient, dim, drop)

    def state_dict(self) -> dict[str, Any]:
        """{group name: bool [units]}."""
        return {g.name: k.clone() for g, k in zip(self.groups, self.keep, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the removed units are zeroed again. UserError when the groups differ."""
        for group in self.groups:
            if group.name not in state or len(state[group.name]) != group.units:
                raise UserError(f"{group.name}: the saved channel mask does not fit this model.")
        self.keep = [torch.ones(g.units, dtype=torch.bool) for g in self.groups]
        self.remove_([state[g.name].cpu().bool() for g in self.groups])


def shrink(
    model: nn.Module, groups: Sequence[Group], mask: SoftMask | Sequence[Tensor], example_input: Example | None = None
) -> Plan:
    """Cut the removed units out of ``model`` for good, in place; its outputs are those of the masked model.

    ``mask``: a `SoftMask`, or bool [units] per group. With ``example_input`` the equality is checked first. The groups
    are spent afterwards. Parameters are new objects: build the optimizer after this.
    UserError: nothing was removed, or a group would be emptied. RunError: the check failed. The model is then whole.
    Warns of groups that keep less than a fifth of their units, by name.
    """
    keep = mask.keep if isinstance(mask, SoftMask) else [k.cpu() for k in mask]
    _check_keep(groups, keep)
    if example_input is not None and not cut_equals_mask(model, example_input, groups, keep):
        raise RunError("the cut model does not compute what the masked one does; nothing was cut.")
    _warn_of_narrow(groups, keep)
    plan = plan_of(groups, keep)
    surgery = Surgery(model)
    try:
        surgery.cut(keep_channels(groups, keep), head_counts(groups, keep))
    except Exception:
        surgery.undo()
        raise
    surgery.settle()
    return plan


def narrow(groups: Sequence[Group], keep: Sequence[Tensor]) -> list[str]:
    """The groups that keep less than a fifth of their units, as "NAME (2 of 16 channels)"."""
    counts = [(group, int(units.sum())) for group, units in zip(groups, keep, strict=True)]
    return [f"{g.name} ({n} of {g.units} {g.kind})" for g, n in counts if n < NARROW * g.units]


def _warn_of_narrow(groups: Sequence[Group], keep: Sequence[Tensor]) -> None:
    found = narrow(groups, keep)
    if found:
        warnings.warn(
            f"few are left in {', '.join(found)}: everything behind passes through them, and accuracy depends on which "
            "they are. A larger floor, or ranking uniform, keeps more there.",
            stacklevel=3,
        )


def _check_keep(groups: Sequence[Group], keep: Sequence[Tensor]) -> None:
    for group, units in zip(groups, keep, strict=True):
        if not bool(units.any()):
            raise UserError(f"{group.name}: all {group.units} {group.kind} would go; a layer cannot be emptied.")
    if all(bool(units.all()) for units in keep):
        raise UserError("nothing was pruned: every channel is kept.")
