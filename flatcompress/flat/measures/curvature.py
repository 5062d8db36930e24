"""Second-order measures: Hessian and Gauss-Newton products, eigenvalues and traces, without forming a matrix.

Everything is the curvature of the mean loss over all given batches (weighted by their sizes), in evaluation mode.
Gradients come from ``torch.autograd.grad``; ``backward(create_graph=True)`` would leak the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.context import normal
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.measures.measuring import Batches, Choice, Loss, Probed, listed, probed
from flatcompress.modules import logits_of
from flatcompress.numerics import hutchinson

Held = Sequence[tuple[Tensor, Tensor]]
Product = Callable[[Sequence[Tensor]], Vector]


def full_gradient(at: Probed, held: Held) -> Vector:
    """The gradient of the mean loss over all samples."""
    total = [torch.zeros_like(p) for p in at.params]
    count = sum(len(x) for x, _ in held)
    for x, y in held:
        vectors.add_(total, at.gradient(x, y)[1], len(x) / count)
    return total


def hessian_product(at: Probed, held: Held, v: Sequence[Tensor]) -> Vector:
    """H v by differentiating g'v."""
    total = [torch.zeros_like(p) for p in at.params]
    count = sum(len(x) for x, _ in held)
    for x, y in held:
        with torch.enable_grad():
            gradient = torch.autograd.grad(at.value(x, y), at.params, create_graph=True, allow_unused=True)
            inner = sum(((g * u).sum() for g, u in zip(gradient, v) if g is not None), torch.zeros(()))
            found = torch.autograd.grad(inner, at.params, allow_unused=True) if inner.requires_grad else []
        vectors.add_(
            total, [torch.zeros_like(p) if h is None else h for p, h in zip(at.params, found)] or total, len(x) / count
        )
    return total


def ggn_product(at: Probed, held: Held, v: Sequence[Tensor]) -> Vector:
    """G v = J' H_L J v, the Gauss-Newton product: positive semi-definite for convex losses."""
    total = [torch.zeros_like(p) for p in at.params]
    count = sum(len(x) for x, _ in held)
    for x, y in held:
        vectors.add_(total, _ggn_batch(at, x, y, v), len(x) / count)
    return total


def _ggn_batch(at: Probed, x: Tensor, y: Tensor, v: Sequence[Tensor]) -> Vector:
    def logits() -> Tensor:
        return logits_of(at.model(x))

    jv = jacobian_product(logits, at.params, v)
    with torch.enable_grad():
        z = logits()
        point = z.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(at.loss(point, y), point, create_graph=True)
        (curved,) = torch.autograd.grad((slope * jv).sum(), point)
        found = torch.autograd.grad(z, at.params, curved, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(at.params, found)]


def jacobian_product(f: Callable[[], Tensor], params: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """J v for J the Jacobian of ``f()`` by ``params``: the derivative of J'u along u, from two reverse passes."""
    with torch.enable_grad():
        z = f()
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, params, u, create_graph=True, allow_unused=True)
        inner = sum(((g * d).sum() for g, d in zip(pulled, v) if g is not None), torch.zeros(()))
        return torch.autograd.grad(inner, u)[0]


PRODUCTS = {"hessian": hessian_product, "ggn": ggn_product}


def top_eigenvalues(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    count: int = 1,
    *,
    matrix: str = "hessian",
    iterations: int = 50,
    tolerance: float = 1e-4,
    perturbed: Choice | None = None,
    seed: int = 0,
) -> list[float]:
    """The ``count`` algebraically largest eigenvalues, descending, by Lanczos with full reorthogonalisation.

    Unlike power iteration, which returns the eigenvalue of largest magnitude, a strongly negative one cannot win.
    matrix: ``hessian`` or ``ggn``. Stops after ``iterations`` products, or when the values wanted have changed by less
    than ``tolerance`` of the largest twice in a row; 0 runs to the end.
    """
    with probed(model, loss, perturbed=perturbed) as at:
        held = listed(batches, model)
        size = sum(p.numel() for p in at.params)
        if not 1 <= count <= size:
            raise UserError(f"count is {count}; it must lie in 1..{size}, the number of parameters")
        return lanczos(_product(at, held, matrix), _unit(at, seed), min(iterations, size), count, tolerance)


def trace(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    matrix: str = "hessian",
    draws: int = 20,
    perturbed: Choice | None = None,
    seed: int = 0,
) -> float:
    """The trace by Hutchinson's estimator, the mean of v'Hv over random signs v."""
    with probed(model, loss, perturbed=perturbed) as at:
        return sum(hutchinson(_signs(at, seed), _product(at, listed(batches, model), matrix), draws))


def frobenius_squared(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    matrix: str = "hessian",
    draws: int = 20,
    perturbed: Choice | None = None,
    seed: int = 0,
) -> float:
    """``||H||_F^2 = E ||Hv||^2`` over random signs v."""
    with probed(model, loss, perturbed=perturbed) as at:
        product, signs = _product(at, listed(batches, model), matrix), _signs(at, seed)
        return sum(float(vectors.norm(product(signs(j)))) ** 2 for j in range(draws)) / draws


def lanczos(product: Product, start: Vector, iterations: int, count: int, tolerance: float) -> list[float]:
    """The ``count`` largest Ritz values, descending, of a symmetric operator from ``start`` (unit length)."""
    basis = [start]
    diagonal: list[float] = []
    beside: list[float] = []
    top: list[float] = []
    calm = 0
    for k in range(iterations):
        w = product(basis[k])
        diagonal.append(float(vectors.dot(w, basis[k])))
        for q in [*basis, *basis]:  # twice: once leaves ghosts of converged eigenvalues
            w = vectors.sub(w, q, float(vectors.dot(w, q)))
        before, top = top, _ritz(diagonal, beside)[:count]
        calm = calm + 1 if _close(before, top, tolerance) else 0
        size = float(vectors.norm(w))
        if calm == 2 or size < 1e-8 * max(1.0, *map(abs, diagonal)):
            break
        beside.append(size)
        basis.append(vectors.scale(w, 1 / size))
    return top


def _ritz(diagonal: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Eigenvalues of the tridiagonal matrix, descending."""
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        t = t + torch.diag(off, 1) + torch.diag(off, -1)
    return sorted(torch.linalg.eigvalsh(t).tolist(), reverse=True)


def _close(before: Sequence[float], now: Sequence[float], tolerance: float) -> bool:
    if len(before) != len(now):
        return False
    return all(abs(a - b) < tolerance * abs(now[0]) for a, b in zip(before, now))


def _product(at: Probed, held: Held, matrix: str) -> Product:
    if matrix not in PRODUCTS:
        raise unknown("matrix", matrix, PRODUCTS)
    return lambda v: PRODUCTS[matrix](at, held, v)


def _signs(at: Probed, seed: int) -> Callable[[int], Vector]:
    """Draw j of random signs, one tensor per parameter."""
    return lambda j: [torch.sign(n) for n in normal([p.detach() for p in at.params], seed + j)]


def _unit(at: Probed, seed: int) -> Vector:
    v = normal([p.detach() for p in at.params], seed)
    return vectors.scale(v, 1 / float(vectors.norm(v)))
