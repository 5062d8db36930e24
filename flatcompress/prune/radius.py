"""AdaSAP's adaptive radius: unimportant neurons are perturbed more, so that removing them hurts less.

arXiv 2306.14306, eq. 2: rho_i = rho_max - (s_i - s_min) / (s_max - s_min) * (rho_max - rho_min), with s_i the score of
neuron i. Only the radius is made here; the flat engine's ball slot does the perturbing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group

Radius = float | Tensor


def unit_radius(
    scores: Tensor, rho_min: float, rho_max: float, percentile: float | None = None, keep: Tensor | None = None
) -> Tensor:
    """rho [units] for one population of scores [units].

    ``percentile`` (0..100) clips the scores from above first, so one outlier cannot push all others to rho_max.
    ``keep``: removed units do not count and get 0. Equal scores get the middle, (rho_min + rho_max) / 2.

    >>> unit_radius(torch.tensor([1.0, 2.0, 4.0, 5.0]), 0.01, 2.0)
    tensor([2.0000, 1.5025, 0.5075, 0.0100])
    """
    alive = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.to(scores.device)
    population = scores[alive]
    if population.numel() == 0:
        return torch.zeros_like(scores)
    high = population.max() if percentile is None else torch.quantile(population, percentile / 100)
    low = population.min()
    span = high - low
    if span <= 0:
        radius = torch.full_like(scores, (rho_min + rho_max) / 2)
    else:
        radius = rho_max - (scores.clamp(max=high) - low) / span * (rho_max - rho_min)
    return torch.where(alive, radius, torch.zeros_like(radius))


def group_radius(
    scores: Sequence[Tensor],
    rho_min: float,
    rho_max: float,
    percentile: float | None = None,
    keep: Sequence[Tensor] | None = None,
    population: str = "group",
) -> list[Tensor]:
    """`unit_radius` of every group; ``population`` "group" compares units inside a group, "global" across all."""
    _check(rho_min, rho_max, percentile, population)
    keeps = list(keep) if keep is not None else [torch.ones_like(s, dtype=torch.bool) for s in scores]
    if population == "global":
        joint = unit_radius(torch.cat(list(scores)), rho_min, rho_max, percentile, torch.cat(keeps))
        return list(joint.split([len(s) for s in scores]))
    return [unit_radius(s, rho_min, rho_max, percentile, k) for s, k in zip(scores, keeps, strict=True)]


def adaptive_radius(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    params: Sequence[nn.Parameter],
    rho_min: float = 0.01,
    rho_max: float = 2.0,
    percentile: float | None = None,
    *,
    norm: str = "global",
    population: str = "group",
    keep: Sequence[Tensor] | None = None,
) -> list[Radius]:
    """A radius per parameter, in the order of ``params``, for the flat engine's ball (arXiv 2306.14306, eq. 2).

    ``scores``: [units] per group of ``groups``; the least gets ``rho_max``, the greatest ``rho_min``, scores above
    ``percentile`` count as it. A weight's row, its bias and its BatchNorm entries share the unit's radius: a tensor
    that broadcasts to the parameter. Parameters of no group get ``rho_min`` (a float). With ``norm="per_neuron"`` only
    weights of rank >= 2 are perturbed; all others get 0. ``keep`` (bool per unit, as of `SoftMask.keep`): removed units
    get 0. UserError: radii out of order, an unknown norm or population.
    """
    if norm not in ("global", "per_neuron"):
        raise unknown("norm", norm, ("global", "per_neuron"))
    radii = group_radius(scores, rho_min, rho_max, percentile, keep, population)
    found: dict[int, Tensor] = {}
    for group, rho in zip(groups, radii, strict=True):
        for member in group.outs:
            channels = member.spread(rho.cpu(), rho_min)
            for _, parameter, dim in axes.parameters(member.module, member.axis):
                mine = axes.along(channels, parameter, dim)
                before = found.get(id(parameter))
                theirs = axes.along(member.owner >= 0, parameter, dim)
                found[id(parameter)] = mine if before is None else torch.where(theirs, mine, before)
    return [_of(parameter, found, rho_min, norm) for parameter in params]


def _of(parameter: nn.Parameter, found: dict[int, Tensor], rho_min: float, norm: str) -> Radius:
    if norm == "per_neuron" and parameter.dim() < 2:
        return 0.0
    radius = found.get(id(parameter))
    return rho_min if radius is None else radius.to(parameter.dtype)


def relative_sizes(params: Sequence[nn.Parameter], radii: Sequence[Radius]) -> list[float]:
    """Largest rho_i / sqrt(d_i) per parameter: by which share a neuron's weights move in ``per_neuron`` norm.

    rho_i are the ``radii`` of ``params``, as `adaptive_radius` gives them.

    d_i is the size of one row (dimension 0). 0.5 and more means weights may change sign (depthwise filters, d = 9,
    reach it at rho 1.5).
    """
    sizes = []
    for parameter, radius in zip(params, radii, strict=True):
        row = math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1.0
        sizes.append(float(torch.as_tensor(radius).max()) / row)
    return sizes


def _check(rho_min: float, rho_max: float, percentile: float | None, population: str) -> None:
    if not 0 <= rho_min <= rho_max:
        raise UserError(f"AdaSAP radii must be 0 <= rho_min <= rho_max, found rho_min {rho_min}, rho_max {rho_max}.")
    if percentile is not None and not 0 < percentile <= 100:
        raise UserError(f"percentile must be in (0, 100], found {percentile}.")
    if population not in ("group", "global"):
        raise unknown("score population", population, ("group", "global"))
