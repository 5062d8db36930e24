"""Auto-PGD on the weights: the search for the worst point of a ball (arXiv 2302.07011, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.context import normal
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.measures.measuring import Probed

MOMENTUM = 0.75
MIN_UPDATES = 0.75


@dataclass(frozen=True)
class Region:
    """``||d / c|| <= rho`` in the l2 or linf norm; c is 1, or |w| when adaptive."""

    norm: str
    rho: float
    c: Sequence[Tensor] | None

    def ascend(self, delta: Vector, gradient: Vector, step: float) -> Vector:
        """One step along the gradient (l2: normalised by the gradient's norm) or its sign (linf)."""
        if self.norm == "l2":
            direction = vectors.scale(gradient, step / (vectors.norm(gradient) + 1e-12))
        else:
            direction = [torch.sign(g) * step for g in gradient]
        return vectors.add(delta, direction if self.c is None else vectors.mul(direction, self.c))

    def project(self, delta: Vector) -> Vector:
        """The nearest point of the region."""
        if self.norm == "linf":
            bounds = (
                [torch.full_like(d, self.rho) for d in delta] if self.c is None else vectors.scale(self.c, self.rho)
            )
            return [d.clamp(-b, b) for d, b in zip(delta, bounds)]
        if self.c is None:
            size = float(vectors.norm(delta))
            return delta if size <= self.rho else vectors.scale(delta, self.rho / size)
        return self._onto_ellipsoid(delta, self.c)

    def _onto_ellipsoid(self, delta: Vector, c: Sequence[Tensor]) -> Vector:
        """d_i / (1 + 2 lam / c_i^2) with lam by bisection; a coordinate with c = 0 cannot move."""
        d = torch.cat([x.reshape(-1) for x in delta]).double()
        inverse = torch.cat([x.reshape(-1) for x in c]).double().reciprocal()
        live = torch.isfinite(inverse)

        def shrunk(lam: float) -> Tensor:
            return torch.where(live, d / (1 + 2 * lam * inverse**2), torch.zeros_like(d))

        def size(x: Tensor) -> float:
            return float(torch.linalg.vector_norm((x * inverse)[live]))

        low, high = 0.0, 1.0
        if size(shrunk(0.0)) > self.rho:
            while size(shrunk(high)) > self.rho:
                high *= 2
            while high - low > 1e-12 * high:
                middle = (low + high) / 2
                low, high = (middle, high) if size(shrunk(middle)) > self.rho else (low, middle)
        flat = shrunk(high if low > 0 or high < 1.0 or size(shrunk(0.0)) > self.rho else 0.0)
        parts = flat.split([x.numel() for x in delta])
        return [part.reshape(x.shape).to(x) for part, x in zip(parts, delta)]

    def start(self, like: Vector, seed: int) -> Vector:
        """A random start: rho c N(0, 1) for l2, uniform in the box for linf."""
        noise = normal(like, seed)
        if self.norm == "linf":
            noise = [torch.erf(n / math.sqrt(2)) for n in noise]  # the normal law mapped to the uniform one on -1..1
        noise = vectors.scale(noise, self.rho)
        return noise if self.c is None else vectors.mul(noise, self.c)


def checkpoints(steps: int) -> set[int]:
    """Iterations after which the step may be halved: at 0.22 n, then at shrinking intervals (Auto-PGD, 2003.01690)."""
    shares, marks = [0.0, 0.22], [0, math.ceil(0.22 * steps)]
    while marks[-1] < steps and marks[-1] != marks[-2]:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        marks.append(math.ceil(shares[-1] * steps))
    return set(marks[1:])


def worst_loss(at: Probed, region: Region, x: Tensor, y: Tensor, steps: int, start: Vector | None) -> float:
    """The largest loss seen by one Auto-PGD run of ``steps`` iterations on one batch.

    As in the published code, a halved step restarts from the gradient at the best point while the displacement
    goes on from the last one, and the momentum average is not projected again.
    """
    zero = [torch.zeros_like(p) for p in at.params]
    delta = zero if start is None else start
    previous, point, best_point = delta, delta, delta
    best = last_best = at.at(zero, x, y)
    step = last_step = 2 * region.rho
    updates, last_mark = 0, 0
    marks = checkpoints(steps)
    for i in range(steps):
        _, gradient = at.gradient(x, y, point)
        moved = region.project(region.ascend(delta, gradient, step))
        delta, previous = vectors.add(vectors.scale(moved, MOMENTUM), previous, 1 - MOMENTUM), delta
        point = delta
        now = at.at(point, x, y)
        if now > best:
            best, best_point, updates = now, point, updates + 1
        if i in marks:
            stuck = last_step == step and last_best == best
            few = updates < MIN_UPDATES * (i - last_mark)
            last_step, last_best, last_mark, updates = step, best, i, 0
            if few or stuck:
                step, point = step / 2, best_point
    return best
