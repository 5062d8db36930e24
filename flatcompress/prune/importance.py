"""How much each unit matters: one number per unit of every group, low means expendable.

Every score is a function of one group that returns raw scores [units]; `score` normalises them inside the group, so
that layers of different size can be ranked together. Notation: w a weight, g its gradient, gamma and beta BatchNorm's
scale and shift; "members" are the layers that the units of the group live in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatcompress.errors import UserError, unknown
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group, Member
from flatcompress.randomness import mixed
from flatcompress.registry import Registry


@dataclass(frozen=True)
class Facts:
    """``needs_gradients``: reads ``.grad``. ``per_sample``: of one sample at a time. ``normalised``: its scores can be
    compared between layers as they are."""

    needs_gradients: bool = False
    per_sample: bool = False
    normalised: bool = False


IMPORTANCES: Registry[Facts] = Registry("importance", Facts)
_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "mean": lambda s: s.mean(),
    "max": lambda s: s.max(),
    "sum": lambda s: s.sum(),
}


def _weights(group: Group) -> Iterator[tuple[Member, nn.Parameter, int]]:
    for member in group.members:
        for name, parameter, dim in axes.parameters(member.module, member.axis):
            if name.startswith("weight"):
                yield member, parameter, dim


def _unit_sum(group: Group, member: Member, values: Tensor, dim: int) -> Tensor:
    return member.sum_units(axes.per_channel(member.module, member.axis, values, dim), group.units)


def _trained(member: Member) -> Iterator[tuple[nn.Parameter, int]]:
    """The member's parameters that are not frozen: those that have a gradient."""
    for _, parameter, dim in axes.parameters(member.module, member.axis):
        if parameter.requires_grad:
            yield parameter, dim


def _with_gradients(group: Group, members: Iterable[Member]) -> list[Member]:
    """The members that are not frozen. UserError when none is left to judge the group by."""
    found = [m for m in members if next(_trained(m), None) is not None]
    if not found:
        raise UserError(
            f"{group.name}: its layers are frozen (requires_grad is False), so this importance has no gradient to go "
            "by. Use importance group_l2, or put the layer into ignore."
        )
    return found


def _grad(group: Group, member: Member, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise UserError(
            f"{member.name}: this importance needs gradients and there are none; call loss.backward() first, or give "
            "prune() batches."
        )
    return parameter.grad.detach()


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean(0)


@torch.no_grad()
def group_l2(group: Group, p: float = 2.0) -> Tensor:
    """Mean over members of sum |w|^p over the unit's slices, BN gamma included (DepGraph, arXiv 2301.12900)."""
    return _mean([_unit_sum(group, m, w.abs().pow(p), dim) for m, w, dim in _weights(group)])


def _norms(group: Group) -> list[Member]:
    norms = [m for m in group.members if isinstance(m.module, _BatchNorm) and m.module.affine]
    if not norms:
        raise UserError(f"{group.name}: no BatchNorm among its layers; use importance group_l2 or taylor instead.")
    return norms


@torch.no_grad()
def bn_scale(group: Group) -> Tensor:
    """Mean over the group's BatchNorms of |gamma| (Network Slimming, arXiv 1708.06519)."""
    return _mean([_unit_sum(group, m, m.module.get_parameter("weight").abs(), 0) for m in _norms(group)])


@torch.no_grad()
def taylor(group: Group) -> Tensor:
    """Mean over members of (sum over the unit's parameters of g*w)^2 (arXiv 1906.10771, in its group form).

    In front of a BatchNorm the sum over a filter is 0 (the loss does not see the filter's size); the BatchNorm and
    the consumers carry the signal.
    """
    return _mean([_first_order(group, m).square() for m in _with_gradients(group, group.members)])


@torch.no_grad()
def taylor_abs(group: Group) -> Tensor:
    """Mean over members of sum |g*w|: what torch-pruning calls Taylor importance by default."""
    return _mean([_first_order(group, m, absolute=True) for m in _with_gradients(group, group.members)])


@torch.no_grad()
def bn_taylor(group: Group) -> Tensor:
    """|sum over the group's BatchNorms of gamma*g_gamma + beta*g_beta|: the gate score of HALP (arXiv 2110.10811)."""
    return torch.stack([_first_order(group, m) for m in _with_gradients(group, _norms(group))]).sum(0).abs()


@torch.no_grad()
def hessian(group: Group) -> Tensor:
    """Mean over members of sum w^2 * g^2 (Optimal Brain Damage with the empirical Fisher as Hessian diagonal).

    Average it over per-sample gradients (`RunningScore` after each single-sample backward) to get w^2 E[g^2].
    """
    parts = []
    for member in _with_gradients(group, group.members):
        total = torch.zeros(group.units)
        for parameter, dim in _trained(member):
            values = (parameter.detach() * _grad(group, member, parameter)).square()
            total = total.to(values.device) + _unit_sum(group, member, values, dim)
        parts.append(total)
    return _mean(parts)


def _first_order(group: Group, member: Member, absolute: bool = False) -> Tensor:
    total = torch.zeros(group.units)
    for parameter, dim in _trained(member):
        values = parameter.detach() * _grad(group, member, parameter)
        values = values.abs() if absolute else values
        total = total.to(values.device) + _unit_sum(group, member, values, dim)
    return total


@torch.no_grad()
def fpgm(group: Group) -> Tensor:
    """Mean over producing layers of sum_j ||F_i - F_j||_2 over the layer's filters (FPGM, arXiv 1811.00250).

    Taken on the weights themselves: a filter near the geometric median can be replaced by the others. A zero filter
    does not score 0.
    """
    parts = []
    for member, weight, dim in _weights(group):
        if member.axis == axes.OUT and weight.dim() > 1:
            filters = weight.transpose(0, dim).flatten(1)
            distance = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            mine = distance.new_zeros(group.units).index_add_(
                0, member.owner.clamp(min=0).to(distance.device), distance * (member.owner >= 0).to(distance.device)
            )
            parts.append(mine / mine.mean().clamp(min=1e-12))
    return _mean(parts)


@torch.no_grad()
def lamp(group: Group) -> Tensor:
    """s_u / sum of s_v over v ranked at or above u, with s the group's summed squares (LAMP, arXiv 2010.07611).

    The largest unit of every group scores 1, so a global ranking can never empty a layer.
    """
    raw = group_l2(group)
    order = raw.argsort(stable=True)
    above = raw[order].flip(0).cumsum(0).flip(0).clamp(min=1e-30)
    return torch.empty_like(raw).index_copy_(0, order, raw[order] / above)


def random(group: Group, seed: int = 0) -> Tensor:
    """Uniform in [0, 1), the same for the same seed and group name."""
    generator = torch.Generator().manual_seed(mixed(seed, zlib.crc32(group.name.encode())))
    return torch.rand(group.units, generator=generator)


IMPORTANCES.add("group_l2", group_l2, "squared weights of all coupled layers", "2301.12900")
IMPORTANCES.add("bn_scale", bn_scale, "size of BatchNorm's gamma", "1708.06519")
IMPORTANCES.add("taylor", taylor, "first-order change of the loss, squared", "1906.10771", needs_gradients=True)
IMPORTANCES.add("taylor_abs", taylor_abs, "sum of |gradient * weight|", "1906.10771", needs_gradients=True)
IMPORTANCES.add(
    "bn_taylor", bn_taylor, "first-order change of the loss at the BatchNorm gate", "2110.10811", needs_gradients=True
)
IMPORTANCES.add(
    "hessian", hessian, "second-order change of the loss, diagonal", "OBD, NeurIPS 1989",
    needs_gradients=True, per_sample=True,
)  # fmt: skip
IMPORTANCES.add("fpgm", fpgm, "distance to the layer's other filters", "1811.00250")
IMPORTANCES.add("lamp", lamp, "layer-adaptive magnitude", "2010.07611", normalised=True)
IMPORTANCES.add("random", random, "a seeded coin", normalised=True)
NEEDS_GRADIENTS = frozenset(name for name, entry in IMPORTANCES.items() if entry.facts.needs_gradients)  # built-in ones


def score(
    groups: Sequence[Group], importance: str = "group_l2", *, normalize: str | None = None, **options: Any
) -> list[Tensor]:
    """Scores [units] of each of ``groups``, on the CPU, divided by the group's ``normalize`` (mean | max | sum | none).

    The default is the mean; LAMP and random scores are left as they are. ``options`` go to the importance. Gradient
    scores read ``.grad``. UserError: unknown name, missing gradients, no BatchNorm where one is needed.
    """
    raw = raw_scores(groups, importance, **options)
    return [normalized(s, importance, normalize) for s in raw]


def raw_scores(groups: Sequence[Group], importance: str, **options: Any) -> list[Tensor]:
    """`score` before normalisation."""
    function = IMPORTANCES[importance]
    return [function(group, **options).float().cpu() for group in groups]


def normalized(raw: Tensor, importance: str, normalize: str | None = None) -> Tensor:
    """``raw`` [units] divided by its own mean (or max, sum, 1)."""
    name = normalize or ("none" if IMPORTANCES[importance].facts.normalised else "mean")
    if name not in _NORMALIZERS:
        raise unknown("normalizer", name, _NORMALIZERS)
    return raw / _NORMALIZERS[name](raw).clamp(min=1e-12)


class RunningScore:
    """Raw scores averaged over iterations, for scores that need gradients: `update` after each backward.

    An iteration with a NaN or infinite score is skipped (arXiv 2110.10811). For ``hessian`` call `update` after
    every single-sample backward.
    """

    def __init__(self, groups: Sequence[Group], importance: str = "taylor", **options: Any) -> None:
        self.groups, self.importance, self.options = list(groups), importance, options
        self.count = 0
        self._last: list[Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new average; done after each prune event."""
        self._last = self._mean()
        self.count = 0
        self.skipped = 0
        self._sum = [torch.zeros(g.units) for g in self.groups]

    def update(self) -> bool:
        """Add the scores of the gradients that are there now; False where they were not finite."""
        now = raw_scores(self.groups, self.importance, **self.options)
        if not all(bool(s.isfinite().all()) for s in now):
            self.skipped += 1
            return False
        self._sum = [total + s for total, s in zip(self._sum, now, strict=True)]
        self.count += 1
        return True

    def scores(self, normalize: str | None = None) -> list[Tensor]:
        """The normalised averages. UserError before the first finite update."""
        if self.count == 0:
            raise UserError(f"importance {self.importance!r}: no finite gradients seen ({self.skipped} skipped).")
        return self.latest(normalize) or []

    def latest(self, normalize: str | None = None) -> list[Tensor] | None:
        """`scores`, or just after a `reset` those of before it; None while no finite gradient was ever seen."""
        mean = self._mean()
        return None if mean is None else [normalized(m, self.importance, normalize) for m in mean]

    def _mean(self) -> list[Tensor] | None:
        return [total / self.count for total in self._sum] if self.count else self._last

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        sums = {"sum": self._sum, "last": self._last}
        copies = {key: None if value is None else [s.clone() for s in value] for key, value in sums.items()}
        return {"count": self.count, "skipped": self.skipped, **copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.count, self.skipped = int(state["count"]), int(state["skipped"])
        self._sum = [s.clone() for s in state["sum"]]
        last = state.get("last")
        self._last = None if last is None else [s.clone() for s in last]
