"""Elastic widths: networks nested in one another that share their weights (MatFormer, arXiv 2310.07707).

A *family* is a full network and narrower ones cut out of it: the units of every group stand in one order, and a width
takes the first share of each (arXiv 2310.07707, section 3.1: T_i uses the first m_i neurons of T_g). A narrower
network holds no weights: they are taken out of the full ones in every forward, so that gradients of any width reach
the one set of weights. What a weight is not (BatchNorm's running statistics, the scales of quantizers) is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatcompress.errors import UserError
from flatcompress.plan import Plan, Step, apply_plan
from flatcompress.prune import channels
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group

Cuts = dict[str, list[tuple[int, Tensor]]]  # parameter of the full network -> (dimension, kept indices) in turn
Orders = Mapping[str, Sequence[int]]  # group -> its units, the one that every width keeps first


def orders_of(groups: Sequence[Group], scores: Sequence[Tensor]) -> dict[str, list[int]]:
    """The units of each of ``groups`` by falling ``scores`` [units]; of equals the earlier comes first."""
    return {g.name: s.argsort(descending=True, stable=True).tolist() for g, s in zip(groups, scores, strict=True)}


def kept_units(
    groups: Sequence[Group], orders: Orders, width: float | Mapping[str, float], least: int = 1
) -> list[Tensor]:
    """What a width keeps, bool [units] per group: the first round(width * units) of its order, at least ``least``.

    ``width``: one share, or a share per group name (a mix; a group that is not named stays whole).
    UserError: a share outside (0, 1], a name that is no group, an order that is not the group's.
    """
    shares = dict.fromkeys((g.name for g in groups), width) if isinstance(width, int | float) else dict(width)
    strange = sorted(set(shares) - {g.name for g in groups})
    if strange:
        raise UserError(f"mix: {strange[0]!r} is no group of channels. Groups: {', '.join(g.name for g in groups)}.")
    kept = []
    for group in groups:
        share = shares.get(group.name, 1.0)
        if not 0 < share <= 1:
            raise UserError(f"{group.name}: a width is a share above 0 and at most 1, found {share:g}.")
        order = orders.get(group.name, ())
        if sorted(order) != list(range(group.units)):
            raise UserError(f"{group.name}: the plan orders {len(order)} units, this model has {group.units}.")
        units = torch.zeros(group.units, dtype=torch.bool)
        units[list(order)[: max(min(least, group.units), round(share * group.units))]] = True
        kept.append(units)
    return kept


def cuts_of(model: nn.Module, data: Mapping[str, Any] | None) -> Cuts:
    """How every parameter of ``model`` is taken by the network that a "channels" step's ``data`` cuts out of it.

    None: by the whole network.
    """
    cuts: Cuts = {name: [] for name, _ in model.named_parameters()}
    for layer, by_axis in (data or {}).get("layers", {}).items():
        module = model.get_submodule(layer)
        for axis, cut in by_axis.items():
            index = axes.local(module, axis, channels.mask_of(cut)).nonzero().flatten()
            for name, _, dim in axes.parameters(module, axis):
                cuts[f"{layer}.{name}"].append((dim, index))
    return cuts


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


class Family(nn.Module):
    """A full network and narrower ones that share its weights; calling it calls the one that is ``active``.

    ``full`` has the weights. ``narrower``: networks of the same names, each cut out of ``full`` as its ``cuts`` say;
    they give their weights up. ``widths``: what the narrower ones are called, rising; the full one is 1.0.
    ``orders``: the units of each group, most important first.
    """

    def __init__(
        self,
        full: nn.Module,
        narrower: Sequence[nn.Module],
        cuts: Sequence[Cuts],
        widths: Sequence[float],
        orders: Orders,
    ) -> None:
        super().__init__()
        self.full = full
        self.narrower = nn.ModuleList(narrower)
        self.cuts, self.widths, self.orders = list(cuts), [*widths, 1.0], orders
        self.active = len(self.narrower)
        for network, cut in zip(self.narrower, self.cuts, strict=True):
            _give_up(network, cut)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active network computes."""
        if self.active == len(self.narrower):
            return self.full(*args, **kwargs)
        return functional_call(self.narrower[self.active], self._weights(self.active), args, kwargs)

    def _weights(self, index: int) -> dict[str, Tensor]:
        weights = dict(self.full.named_parameters())
        return {name: taken(weights[name], cut) for name, cut in self.cuts[index].items()}

    @contextmanager
    def at(self, index: int) -> Iterator[Family]:
        """Inside, the network of ``widths[index]`` is the active one."""
        before, self.active = self.active, index
        try:
            yield self
        finally:
            self.active = before

    def network(self, index: int) -> nn.Module:
        """A copy of the network of ``widths[index]`` that stands alone, with weights of its own."""
        if index == len(self.narrower):
            return copy.deepcopy(self.full)
        found = copy.deepcopy(self.narrower[index])
        _take_back(found, {name: value.detach().clone() for name, value in self._weights(index).items()})
        return found


def taken(weight: Tensor, cut: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The part of ``weight`` that a narrower network has."""
    for dim, index in cut:
        weight = weight.index_select(dim, index.to(weight.device))
    return weight


def _give_up(network: nn.Module, cuts: Cuts) -> None:
    """Its weights become buffers that no checkpoint keeps; `functional_call` puts the family's in their place."""
    for name in cuts:
        module, last = _owner(network, name)
        value = module._parameters.pop(last, None)
        if value is None:
            raise UserError(f"{name}: a narrower network has no such weight; is it computed from others?")
        module.register_buffer(last, value.detach(), persistent=False)


def _take_back(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        module, last = _owner(network, name)
        del module._buffers[last]
        module._non_persistent_buffers_set.discard(last)
        module.register_parameter(last, nn.Parameter(value))


def family_plan(orders: Orders, widths: Sequence[float], plans: Sequence[Plan], ignore: Sequence[str] = ()) -> Plan:
    """The step that builds a family: what is done to the full network for each of ``widths``, the full one last.

    ``orders``: the units of each group. ``ignore``: what `find_groups` was told to leave alone.
    """
    members = [
        {"width": width, "steps": [asdict(step) for step in plan.steps]}
        for width, plan in zip(widths, plans, strict=True)
    ]
    data = {"orders": {k: list(v) for k, v in orders.items()}, "members": members, "ignore": list(ignore)}
    return Plan([Step("elastic", data)])


def member_plans(data: Mapping[str, Any]) -> list[tuple[float, Plan]]:
    """(width, what is done to the full network for it) of an "elastic" step's ``data``, the full one last."""
    return [
        (float(row["width"]), Plan([Step(step["kind"], step["data"]) for step in row["steps"]]))
        for row in data["members"]
    ]


def nest(
    model: nn.Module, groups: Sequence[Group], orders: Orders, widths: Sequence[float], least: int = 1,
    ignore: Sequence[str] = (),
) -> tuple[Family, Plan]:  # fmt: skip
    """The family of ``model`` with ``widths`` (shares; 1.0 is the model itself and the last), and its plan.

    ``groups``: of `find_groups`, which was told to ``ignore``. ``orders``: of `orders_of`. ``least``: units that every
    group keeps.
    UserError: widths that do not rise to 1.0, two that keep the same units.
    """
    widths = list(widths)
    if not widths or sorted(set(widths)) != widths or widths[-1] != 1.0 or widths[0] <= 0:
        raise UserError(f"widths rise to 1.0, the full network, and are above 0; found {widths}.")
    plans, before = [], -1
    for width in widths[:-1]:
        keep = kept_units(groups, orders, width, least)
        count = sum(int(units.sum()) for units in keep)
        if count == before or all(bool(units.all()) for units in keep):
            raise UserError(f"width {width:g} keeps what the one beside it keeps: this network is too narrow for it.")
        before = count
        plans.append(channels.plan_of(groups, keep))
    plan = family_plan(orders, widths, [*plans, Plan()], ignore)
    return apply(model, plan.steps[0].data), plan


def apply(model: nn.Module, data: Mapping[str, Any], example_input: Any = None) -> Family:
    """Repeat an "elastic" step: ``model`` becomes the full network of a family, whose narrower ones are copies, cut.

    ``example_input``: for quantizers, which trace the networks.
    """
    *narrower, (_, whole) = member_plans(data)
    networks, cuts = [], []
    for _, plan in narrower:
        cuts.append(cuts_of(model, plan.of_kind("channels")[0]))
        networks.append(apply_plan(copy.deepcopy(model), plan, example_input))
    full = apply_plan(model, whole, example_input)
    return Family(full, networks, cuts, [width for width, _ in narrower], data["orders"])


def mixed(
    family: Family, data: Mapping[str, Any], fresh: nn.Module, groups: Sequence[Group], keep: Sequence[Tensor],
    example_input: Any = None,
) -> tuple[nn.Module, Plan]:  # fmt: skip
    """The network that keeps ``keep`` (bool [units] per group) of a trained family, and its plan; nothing is trained.

    ``data``: the family's "elastic" step. ``fresh``: the full network without quantizers, of any weights; it is
    changed. ``groups``: found in it. Weights are the full network's. What is not a weight comes from the narrowest
    network that has all of a layer's kept channels, or, where it belongs to no layer, from the one of about that
    size: estimate BatchNorm's statistics anew.
    """
    cut = Plan() if all(bool(units.all()) for units in keep) else channels.plan_of(groups, keep)
    cuts = cuts_of(fresh, next(iter(cut.of_kind("channels")), None))
    outs = [_outputs(plan) for _, plan in member_plans(data)]
    mine = _outputs(cut)
    quantizers = Plan([step for step in member_plans(data)[-1][1].steps if step.kind != "channels"])
    network = apply_plan(fresh, cut + quantizers, example_input)
    weights = dict(family.full.named_parameters())
    found = {name: taken(weights[name].detach(), cut) for name, cut in cuts.items()}
    share = sum(int(k.sum()) for k in keep) / sum(len(k) for k in keep)
    near = min(range(len(family.widths)), key=lambda i: abs(family.widths[i] - share))
    states = [
        dict((family.full if i == len(family.narrower) else family.narrower[i]).state_dict()) for i in range(len(outs))
    ]
    for name, value in network.state_dict().items():
        if name not in found:
            layer = max((one for one in mine if name.startswith(f"{one}.")), key=len, default=None)
            found[name] = _lent(name, value, states, outs, mine, layer, near)
    network.load_state_dict(found)
    return network, cut + quantizers


def _outputs(plan: Plan) -> dict[str, Tensor]:
    """The kept output channels of every layer that a plan cuts, bool [channels]."""
    layers = {name: by for data in plan.of_kind("channels") for name, by in data["layers"].items()}
    return {name: channels.mask_of(by[axes.OUT]) for name, by in layers.items() if axes.OUT in by}


def _lent(
    name: str, value: Tensor, states: Sequence[Mapping[str, Tensor]], outs: Sequence[Mapping[str, Tensor]],
    mine: Mapping[str, Tensor], layer: str | None, near: int,
) -> Tensor:  # fmt: skip
    """What a network lends of its own under ``name``, the channels of ``value`` out of it where it has more."""
    if layer is None:
        fitting = [i for i in (near, *range(len(states))) if states[i][name].shape == value.shape]
        return states[fitting[0]][name]
    wanted = mine[layer]
    donor = next(i for i, out in enumerate(outs) if bool((out.get(layer, torch.ones_like(wanted)) | ~wanted).all()))
    have, lent = outs[donor].get(layer, torch.ones_like(wanted)), states[donor][name]
    if lent.shape == value.shape:
        return lent
    return lent.index_select(0, wanted[have].nonzero().flatten().to(lent.device))
