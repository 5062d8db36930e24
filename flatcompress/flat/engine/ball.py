"""BALL: what bounds the perturbation. One formula turns a direction D into a perturbation e.

    p = 2    e_i = m_i rho_i T_i^2 D_i / (||T D||_scope + tiny)
    p = inf  e_i = m_i rho_i T_i sign(D_i)
    p = None e_i = m_i rho_i T_i^2 D_i                        (not normalised)

T is the geometry: 1 (SAM), ``|w| + eta`` on weights and 1 on the rest (ASAM, arXiv 2102.11600, eq. 3), ``|w|``
on everything (the popular variant of it), ``||w_tensor|| (1 + eta)`` (layerwise) or ``(1 + eta g^2)^(-1/2)``
(Fisher SAM). m is a 0/1 mask. The scope says over what the norm is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.vectors import Vector

if TYPE_CHECKING:
    from flatcompress.flat.engine.context import Step

Rho = float | Callable[["Step"], Any]
Geometry = Callable[["Step", Sequence[int], Sequence[Tensor]], list[Tensor | None]]
INFINITE = (math.inf, "inf", "infinity")
SCOPES = ("all", "selected", "per_group", "per_tensor", "per_row")


@dataclass(frozen=True)
class Ball:
    """The options of the ball; every method that climbs takes them by name beside its own hyper-parameters.

    rho: radius; a float, or a callable of the step for a schedule. A ``rho`` in a parameter group wins.
    p: 2, ``math.inf`` (or ``"inf"``), or None for an unnormalised step.
    geometry: ``plain``, ``elementwise``, ``absolute``, ``layerwise``, ``fisher`` or a callable.
    eta: the offset in the geometry.
    adaptive: short for ``geometry="absolute"``, as in the popular SAM implementations; also per parameter group.
    scope: over what the norm is taken: ``selected`` (what is perturbed; the radius is then exactly rho), ``all``
        (every gradient, perturbed or not), ``per_group``, ``per_tensor``, ``per_row`` (each slice along dim 0).
    mask: masks by name, a list of masks, or ``mask(params, gradients) -> list``; 1 where perturbed.
    tiny: added to the norm.
    key: the entry of a parameter group that replaces rho there.
    """

    rho: float | Callable[[Step], float | Tensor] = 0.05
    p: float | str | None = 2
    geometry: str | Geometry = "plain"
    eta: float = 0.0
    adaptive: bool = False
    scope: str = "selected"
    mask: Any = None
    tiny: float = 1e-12
    key: str = "rho"

    def __post_init__(self) -> None:
        if not callable(self.rho) and not (isinstance(self.rho, int | float) and 0 <= self.rho < math.inf):
            raise UserError(f"{self.key} is {self.rho!r}; the radius must be a finite number >= 0, such as SAM's 0.05")
        if self.eta < 0:
            raise UserError(f"eta is {self.eta!r}; it is added to |w| and must be >= 0")
        if self.scope not in SCOPES:
            raise unknown("norm scope", self.scope, SCOPES)
        if not callable(self.geometry) and self.geometry not in GEOMETRIES:
            raise unknown("geometry", self.geometry, GEOMETRIES)
        if self.p not in (2, *INFINITE, None):
            raise UserError(f"p is {self.p!r}; allowed are 2, inf (math.inf or 'inf') and None (not normalised)")

    def __call__(self, step: Step, direction: Sequence[Tensor]) -> list[Tensor | None]:
        """The perturbation for ``direction``; None for parameters that are not perturbed."""
        chosen = step.selected
        inner = [direction[i] for i in chosen]
        weights = _geometry(self, step, chosen, inner)
        masks = _masks(self.mask, step, chosen, direction)
        if self.p in INFINITE:
            moved = [_times(torch.sign(d), t) for d, t in zip(inner, weights)]
            factors: list[Any] = _radii(self, step, chosen)
        else:
            scaled = [_times(d, t) for d, t in zip(inner, weights)]
            factors = _factors(self, step, direction, scaled, masks)
            moved = [_times(s, t) for s, t in zip(scaled, weights)]
        moved = _scaled(moved, factors)
        if masks is not None:
            moved = [e if m is None else e * m for e, m in zip(moved, masks)]
        return step.scatter(moved)

    def metric(self, step: Step, vector: Sequence[Tensor]) -> list[Tensor | None]:
        """m T^2 v: the vector in the ball's metric, without radius or norm."""
        chosen = step.selected
        inner = [vector[i] for i in chosen]
        moved = [v if t is None else v * t * t for v, t in zip(inner, _geometry(self, step, chosen, inner))]
        masks = _masks(self.mask, step, chosen, vector)
        if masks is not None:
            moved = [v if m is None else v * m for v, m in zip(moved, masks)]
        return step.scatter(moved)


BALL_OPTIONS = tuple(field.name for field in fields(Ball) if field.name not in ("rho", "key"))


def _times(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a * b


def _is_weight(name: str) -> bool:
    return "weight" in name


def _plain(ball: Ball, step: Step, i: int, d: Tensor) -> Tensor | None:
    return None


def _elementwise(ball: Ball, step: Step, i: int, d: Tensor) -> Tensor | None:
    """ASAM: |w| + eta for tensors whose name says weight (normalisation scales too), 1 for the rest."""
    return step.weights[i].abs().add_(step.option(i, "eta", ball.eta)) if _is_weight(step.names[i]) else None


def _absolute(ball: Ball, step: Step, i: int, d: Tensor) -> Tensor | None:
    """|w| (+ eta) on every tensor: a bias that starts at zero is then never perturbed when eta is 0."""
    return step.weights[i].abs().add_(step.option(i, "eta", ball.eta))


def _layerwise(ball: Ball, step: Step, i: int, d: Tensor) -> Tensor | None:
    if not _is_weight(step.names[i]):
        return None
    return torch.linalg.vector_norm(step.weights[i]) * (1 + step.option(i, "eta", ball.eta))


def _fisher(ball: Ball, step: Step, i: int, d: Tensor) -> Tensor | None:
    """Fisher SAM (arXiv 2206.04920): the diagonal Fisher of the batch, 1/F replaced by 1/(1 + eta g^2)."""
    return (1 + step.option(i, "eta", ball.eta) * d * d).rsqrt()


GEOMETRIES: Mapping[str, Callable[[Ball, Step, int, Tensor], Tensor | None]] = {
    "plain": _plain,
    "elementwise": _elementwise,
    "absolute": _absolute,
    "layerwise": _layerwise,
    "fisher": _fisher,
}


def _geometry(ball: Ball, step: Step, chosen: Sequence[int], inner: Sequence[Tensor]) -> list[Tensor | None]:
    if callable(ball.geometry):
        return ball.geometry(step, chosen, inner)
    return [GEOMETRIES[_geometry_name(ball, step, i)](ball, step, i, d) for i, d in zip(chosen, inner)]


def _geometry_name(ball: Ball, step: Step, i: int) -> str:
    group = step.group_of[i]
    if "geometry" in group:
        return str(group["geometry"])
    if "adaptive" in group:
        return "absolute" if group["adaptive"] else "plain"
    return "absolute" if ball.adaptive else str(ball.geometry)


def _masks(mask: Any, step: Step, chosen: Sequence[int], direction: Sequence[Tensor]) -> list[Tensor | None] | None:
    """One mask (or None) per perturbed parameter, from a mapping, a list or a callable over all parameters."""
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        found = [mask.get(step.names[i]) for i in chosen]
    else:
        whole = mask(step.params, list(direction)) if callable(mask) else mask
        found = [whole[i] for i in chosen]
    return [None if m is None else m.to(direction[i]) for i, m in zip(chosen, found)]


def _radii(ball: Ball, step: Step, chosen: Sequence[int]) -> list[float | Tensor]:
    """rho for every perturbed parameter: the radius slot, else the parameter group's own rho, else the ball's."""
    if step.radius is not None and ball.key == "rho":
        slot = step.radius(step.params)
        return [_broadcast(slot[i], step.params[i]) for i in chosen]
    rho = ball.rho(step) if callable(ball.rho) else ball.rho
    return [step.option(i, ball.key, rho) for i in chosen]


def _factors(
    ball: Ball, step: Step, direction: Sequence[Tensor], scaled: Vector, masks: list[Tensor | None] | None
) -> list[Any]:
    """rho_i / (norm_i + tiny) per perturbed parameter: 0-dim, or one value a row."""
    radii = _radii(ball, step, step.selected)
    if ball.p is None:
        return radii
    if ball.scope == "all":
        # The published masked SAM takes the norm before masking, so the real radius shrinks with the mask.
        outside = [direction[i] for i in range(len(direction)) if i not in set(step.selected)]
        counted: Vector = scaled + outside
    else:
        counted = scaled if masks is None else [s if m is None else s * m for s, m in zip(scaled, masks)]
    shared: dict[Any, Any] = {}
    sizes = _norms(ball.scope, step, counted)
    return [_factor(rho, size, ball.tiny, shared) for rho, size in zip(radii, sizes)]


def _factor(rho: float | Tensor, size: Tensor, tiny: float, shared: dict[Any, Any]) -> Any:
    """rho / (size + tiny), computed once for all parameters that share both."""
    key = (id(rho) if isinstance(rho, Tensor) else rho, id(size))
    if key not in shared:
        shared[key] = rho / (size + tiny)
    return shared[key]


def _norms(scope: str, step: Step, counted: Vector) -> list[Tensor]:
    if scope == "per_row":
        return [_row_norms(t) for t in counted]
    if scope == "per_tensor":
        return vectors.norms(counted)
    if scope == "per_group":
        groups = [id(step.group_of[i]) for i in step.selected]
        whole = {g: vectors.norm([t for t, own in zip(counted, groups) if own == g]) for g in set(groups)}
        return [whole[g] for g in groups]
    return [vectors.norm(counted)] * len(step.selected)


def _row_norms(t: Tensor) -> Tensor:
    if t.dim() < 2:
        return t.abs()
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


def _scaled(moved: Vector, factors: Sequence[Any]) -> Vector:
    """Multiply each tensor by its factor; one multi-tensor call when they all share it."""
    if moved and all(f is factors[0] for f in factors) and not (isinstance(factors[0], Tensor) and factors[0].dim()):
        return vectors.scale(moved, factors[0])
    if moved and all(isinstance(f, int | float) for f in factors):
        return list(torch._foreach_mul(moved, [float(f) for f in factors]))
    return [e * f for e, f in zip(moved, factors)]


def _broadcast(factor: float | Tensor, like: Tensor) -> float | Tensor:
    """A radius of one value per row may come as [out]: give it the missing trailing dimensions."""
    if not isinstance(factor, Tensor):
        return factor
    factor = factor.detach().to(like)
    if factor.dim() == 1 and like.dim() > 1 and factor.shape[0] == like.shape[0]:
        factor = factor.reshape(-1, *[1] * (like.dim() - 1))
    return factor
