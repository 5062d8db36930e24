"""The physical cut: take channels out of plain modules, in place, all or nothing, and say what was kept.

A cut is a mapping (layer, axis) -> kept channel indices. Every tensor is indexed, never re-initialised, so a cut of
a trained model is the smaller trained model; a plan repeats it on a fresh model and the checkpoint fills it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.plan import Plan, Step
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group
from flatcompress.stale import retire

Keep = dict[tuple[str, str], Tensor]  # (layer, axis) -> bool [channels]


def keep_channels(groups: Sequence[Group], keep: Sequence[Tensor]) -> Keep:
    """Kept units per group (bool [units]) as kept channels per layer axis; several groups may share an axis."""
    kept: Keep = {}
    for group, units in zip(groups, keep, strict=True):
        if bool(units.all()):
            continue
        for member in group.members:
            mine = member.spread(units.cpu(), True)
            key = (member.name, member.axis)
            kept[key] = kept[key] & mine if key in kept else mine
    return kept


class Surgery:
    """Cuts that can be undone: every replaced attribute is remembered until the object is dropped."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def cut(self, kept: Keep, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Index every tensor of every layer axis in ``kept`` and set the attributes in ``counts``."""
        edits = [(self.model.get_submodule(name), axis, mask) for (name, axis), mask in kept.items()]
        # Read everything first: a grouped convolution with one input left per block looks depthwise afterwards.
        indices = [axes.local(module, axis, mask).nonzero().flatten() for module, axis, mask in edits]
        tensors = [[(name, dim) for name, _, dim in axes.tensors(module, axis)] for module, axis, _ in edits]
        sizes = [axes.resized(module, axis, int(mask.sum())) for module, axis, mask in edits]
        for (module, _, _), index, names, attributes in zip(edits, indices, tensors, sizes, strict=True):
            for name, dim in names:
                value = getattr(module, name).detach()
                self._replace(module, name, value.index_select(dim, index.to(value.device)))
            self._set_all(module, attributes)
        for name, numbers in counts.items():
            self._set_all(self.model.get_submodule(name), numbers)

    def _set_all(self, module: nn.Module, attributes: Mapping[str, int]) -> None:
        for attribute, number in attributes.items():
            self._set(module.__dict__, attribute, number)

    def _replace(self, module: nn.Module, name: str, value: Tensor) -> None:
        if name in module._parameters:
            old = module._parameters[name]
            assert old is not None
            self._set(module._parameters, name, nn.Parameter(value, requires_grad=old.requires_grad))
        else:
            self._set(module._buffers, name, value)

    def _set(self, table: dict[str, Any], name: str, value: Any) -> None:
        self._before.append((table, name, table[name]))
        table[name] = value

    def settle(self) -> None:
        """The cut stays: optimizers that hold what it replaced are told at their next step."""
        retire([old for _, _, old in self._before if isinstance(old, nn.Parameter)], "the model was pruned")
        self._before.clear()

    def undo(self) -> None:
        """Put every attribute back, newest first."""
        while self._before:
            table, name, value = self._before.pop()
            table[name] = value


def runs(mask: Tensor) -> list[list[int]]:
    """The kept indices of a bool vector as [start, stop) pairs.

    >>> runs(torch.tensor([True, True, False, True]))
    [[0, 2], [3, 4]]
    """
    padded = torch.cat([torch.zeros(1, dtype=torch.int8), mask.to(torch.int8), torch.zeros(1, dtype=torch.int8)])
    change = padded.diff()
    starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    return torch.stack([starts, stops], 1).tolist()


def mask_of(cut: Mapping[str, Any], where: str = "plan") -> Tensor:
    """The kept channels of one axis in a plan's data, bool [channels]. UserError, beginning with ``where``: damaged."""
    return _from_runs(cut["keep"], cut["of"], where)


def _from_runs(pairs: Any, total: int, where: str) -> Tensor:
    mask = torch.zeros(total, dtype=torch.bool)
    last = 0
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{where}: the plan keeps no channel here ({pairs!r}).")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and last <= pair[0] < pair[1] <= total):
            raise UserError(f"{where}: {pair!r} is no range of kept channels of {total}.")
        mask[pair[0] : pair[1]] = True
        last = pair[1]
    return mask


def head_counts(groups: Sequence[Group], keep: Sequence[Tensor]) -> dict[str, dict[str, int]]:
    """Attributes to set again after a cut: {module: {attribute: new value}}."""
    counts: dict[str, dict[str, int]] = {}
    for group, units in zip(groups, keep, strict=True):
        for name, attribute, per_unit in () if bool(units.all()) else group.counts:
            counts.setdefault(name, {})[attribute] = per_unit * int(units.sum())
    return counts


def plan_of(groups: Sequence[Group], keep: Sequence[Tensor]) -> Plan:
    """The plan that repeats the cut: per layer and axis the total and the kept runs, and attributes to set."""
    layers: dict[str, dict[str, Any]] = {}
    for (name, axis), mask in keep_channels(groups, keep).items():
        layers.setdefault(name, {})[axis] = {"of": len(mask), "keep": runs(mask)}
    kept, total = channel_count(groups, keep)
    data = {"layers": layers, "attributes": head_counts(groups, keep), "kept_channels": kept, "total_channels": total}
    return Plan([Step("channels", data)])


def channel_count(groups: Sequence[Group], keep: Sequence[Tensor]) -> tuple[int, int]:
    """(kept, total) channels of ``groups``; an attention head counts as all of its channels."""
    kept = sum(int(units.sum()) * group.channels // group.units for group, units in zip(groups, keep, strict=True))
    return kept, sum(group.channels for group in groups)


def apply(model: nn.Module, data: dict[str, Any], example_input: Any = None) -> nn.Module:
    """Repeat a "channels" step on ``model``, in place. Nothing is traced, so ``example_input`` is not needed.

    UserError names the first layer that does not fit the plan; the model is then as before.
    """
    kept: Keep = {}
    for name, cuts in data.get("layers", {}).items():
        for axis, cut in cuts.items():
            kept[name, axis] = _fitting(model, name, axis, cut)
    for name, attributes in data.get("attributes", {}).items():
        for attribute in attributes:
            if not hasattr(_layer(model, name), attribute):
                raise UserError(f"{name}: the plan sets {attribute!r}, which this {_type(model, name)} does not have.")
    surgery = Surgery(model)
    try:
        surgery.cut(kept, data.get("attributes", {}))
    except Exception:
        surgery.undo()
        raise
    surgery.settle()
    return model


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{name}: the plan cuts this layer, which {type(model).__name__} does not have.") from None


def _type(model: nn.Module, name: str) -> str:
    return type(_layer(model, name)).__name__


def _fitting(model: nn.Module, name: str, axis: str, cut: dict[str, Any]) -> Tensor:
    module = _layer(model, name)
    if axis not in (axes.IN, axes.OUT) or not axes.cuttable(module):
        raise UserError(f"{name}: the plan cuts the {axis!r} channels of a {_type(model, name)}; that cannot be cut.")
    have, total = axes.width(module, axis), cut["of"]
    if have != total:
        side = "output" if axis == axes.OUT else "input"
        raise UserError(f"{name}: the plan was made for {total} {side} channels, this model has {have}.")
    return _from_runs(cut["keep"], total, name)
