"""Pruning-aware regularisation: functions that add to gradients between ``loss.backward()`` and the optimizer's step.

Each changes ``.grad`` in place and leaves parameters without a gradient alone. They are the baselines AdaSAP is
compared with, and can be combined with any optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatcompress.errors import UserError
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.groups import Group, Member
from flatcompress.prune.importance import group_l2


def _slices(group: Group, per_unit: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, Member]]:
    """Every weight of the group that has a gradient, with ``per_unit`` spread along it (0 for other groups)."""
    for member in group.members:
        values = axes.local(member.module, member.axis, member.spread(per_unit.float().cpu(), 0.0))
        for name, parameter, dim in axes.parameters(member.module, member.axis):
            if name == "weight" and parameter.grad is not None:
                yield parameter, axes.along(values, parameter, dim).to(parameter.dtype), member


@torch.no_grad()
def mask_sparsity_(groups: Sequence[Group], keep: Sequence[Tensor], factor: float = 5e-4) -> None:
    """L1 on BatchNorm's gamma of only those units that ``keep`` drops (MaskSparsity, arXiv 2201.06776).

    grad += factor * sign(gamma) there, exactly nothing elsewhere. UserError when no group has a BatchNorm.
    """
    found = False
    for group, units in zip(groups, keep, strict=True):
        for parameter, drop, member in _slices(group, ~units):
            if isinstance(member.module, _BatchNorm):
                found = True
                _grad(parameter).add_(factor * drop * parameter.sign())
    if not found:
        raise UserError(_NO_GAMMA)


_NO_GAMMA = "MaskSparsity acts on BatchNorm's gamma, and no BatchNorm of these groups has a gradient."


def require_gammas(groups: Sequence[Group]) -> None:
    """UserError when no group has a BatchNorm whose gamma is trained, which `mask_sparsity_` would only find later."""
    norms = (m.module for group in groups for m in group.outs if isinstance(m.module, _BatchNorm))
    if not any(norm.affine and norm.weight.requires_grad for norm in norms):
        raise UserError(_NO_GAMMA)


@torch.no_grad()
def group_norm_(groups: Sequence[Group], strength: float = 1e-4, base: float = 2.0, alpha: float = 4.0) -> None:
    """Shrink whole coupled groups, the unimportant ones most (DepGraph, arXiv 2301.12900).

    grad += strength * gamma_k * w with gamma_k = base^(alpha * (I_max - I_k) / (I_max - I_min)) and
    I_k = sqrt(group_l2): from ``strength`` for the most to 16 * ``strength`` for the least important unit.
    """
    for group in groups:
        importance = group_l2(group).sqrt()
        span = (importance.max() - importance.min()).clamp(min=1e-12)
        gamma = base ** (alpha * (importance.max() - importance) / span)
        for parameter, weight, _ in _slices(group, gamma):
            _grad(parameter).add_(strength * weight * parameter)


def growing_strength(step: int, growth: float = 1e-4, every: int = 10, ceiling: float = 1.0) -> float:
    """The penalty factor after ``step`` steps: ``growth`` more every ``every`` steps, up to ``ceiling``.

    >>> [growing_strength(s, 0.1, 2, 0.25) for s in range(0, 8, 2)]
    [0.1, 0.2, 0.25, 0.25]
    """
    return min(ceiling, growth * (step // every + 1))


@torch.no_grad()
def growing_(groups: Sequence[Group], keep: Sequence[Tensor], strength: float) -> None:
    """L2 on the units that ``keep`` drops, by a growing factor (GReg-1, arXiv 2012.09243): grad += strength * w."""
    for group, units in zip(groups, keep, strict=True):
        for parameter, drop, _ in _slices(group, ~units):
            _grad(parameter).add_(strength * drop * parameter)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
