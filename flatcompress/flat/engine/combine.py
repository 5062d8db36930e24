"""COMBINE: what projections and mixtures the rows share, over the whole vector or tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.vectors import Vector

Vectors = Sequence[Tensor]


def orthogonal(a: Vectors, b: Vectors) -> Vector:
    """``a - proj_b(a)``: the part of a that b does not see."""
    return vectors.sub(a, vectors.project(a, b))


def _orthogonal_each(a: Vectors, b: Vectors) -> Vector:
    return [orthogonal([x], [y])[0] for x, y in zip(a, b)]


def add_along(g: Vectors, v: Vectors, alpha: float) -> Vector:
    """``g + alpha ||g|| v / ||v||``; g where v is 0."""
    return vectors.add(g, vectors.scale(v, alpha * vectors.ratio(vectors.norm(g), vectors.norm(v) + 1e-12)))


def _add_along_each(g: Vectors, v: Vectors, alpha: float) -> Vector:
    # 1e-8 is the guard of the per-tensor implementations; small tensors have norms at which it is seen.
    sizes = zip(g, v, vectors.norms(g), vectors.norms(v))
    return [x + u * (alpha * nx / (nu + 1e-8)) for x, u, nx, nu in sizes]


@dataclass(frozen=True)
class Scope:
    """Projection and rescaling over one scope."""

    orthogonal: Callable[[Vectors, Vectors], Vector]
    add_along: Callable[[Vectors, Vectors, float], Vector]


SCOPES = {"all": Scope(orthogonal, add_along), "per_tensor": Scope(_orthogonal_each, _add_along_each)}
