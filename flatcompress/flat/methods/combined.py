"""Methods that put the gradients at two points together in another way than SAM does, or climb to several points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.engine.hyper import non_negative, plus
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method


def gnp(rho: Rho = 0.05, alpha: float = 0.8, **ball: Any) -> Method:
    """Penalising the gradient norm, L + lam ||grad L||: g = (1 - alpha) g0 + alpha g1, alpha = lam / rho (2202.03599).

    alpha = 1 is SAM, alpha = 0 the base optimizer.
    """
    ascent = Ball(rho, **ball)
    non_negative(alpha=alpha)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return vectors.add(g0, vectors.sub(g1, g0), alpha)

    return Method(program, ascent)


def stablesam(rho: Rho = 0.05, **ball: Any) -> Method:
    """StableSAM: SAM's gradient at the length of the plain one, g = g1 ||g0|| / ||g1|| (arXiv 2401.07250)."""
    ascent = Ball(rho, **ball)

    def program(step: Step) -> Program:
        g0 = yield HERE
        size = vectors.norm(g0)
        g1 = yield Probe(ascent(step, g0))
        return vectors.scale(g1, vectors.ratio(size, vectors.norm(g1)))

    return Method(program, ascent)


def xsam(
    rho: Rho = 0.05,
    rho_m: float = 0.1,
    ascents: int = 1,
    alpha: float | None = None,
    alpha_max: float = 2.0,
    points: int = 21,
    every: int = 100,
    **ball: Any,
) -> Method:
    """XSAM: away from the largest loss around w, searched for on an arc (arXiv 2603.10048, eq. 6, algorithm 1).

    After ``ascents`` SAM steps up, v0 is the unit vector to the point reached and v1 that of the gradient g_k there,
    psi the angle between them. On the arc
        v(a) = sin((1 - a) psi) / sin(psi) v0 + sin(a psi) / sin(psi) v1
    a is where L(w + rho_m v(a)) is largest among ``points`` values in 0..alpha_max, looked for every ``every`` steps
    (the authors: once an epoch); the update is g = ||g_k|| v(a). a = 1 is SAM. alpha: fixes a instead of searching.
    The search takes ``points`` more forwards (passes, with a closure that knows no ``keep``). All defaults but rho's
    are ours.
    """
    ascent = Ball(rho, **ball)
    non_negative(rho_m=rho_m, alpha_max=alpha_max)
    if min(ascents, every) < 1 or points < 2:
        raise UserError(f"xsam needs ascents, every >= 1 and points >= 2; found {ascents}, {every} and {points}")
    grid = [alpha_max * i / (points - 1) for i in range(points)]

    def program(step: Step) -> Program:
        g = yield HERE
        e: Any = None
        for _ in range(ascents):
            climb = ascent(step, g)
            e = climb if e is None else plus(e, climb)
            g = yield Probe(e)
        reached = [torch.zeros_like(p) if x is None else x for x, p in zip(e, step.params)]
        size = vectors.norm(g)
        if not float(vectors.norm(reached)) or not float(size):
            return Result(g, [])
        v0, v1 = _unit(reached), _unit(g)
        a, found = step.memory.values.get("alpha") if alpha is None else alpha, []
        if a is None or (alpha is None and step.t % every == 0):
            for at in grid:
                yield Probe(vectors.scale(on_arc(v0, v1, at), rho_m), backward=False)
                found.append(step.losses[-1].mean())
            found = [step.agreed(torch.stack(found))]
            a = grid[int(found[0].argmax())]
        return Result(vectors.scale(on_arc(v0, v1, a), size), [found] if found else [])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        if kept:  # the mean over micro-batches and processes, so that all go on with one value
            step.memory.values["alpha"] = grid[int(kept[0][0].argmax())]

    return Method(program, ascent, remember=remember, keeps=True)


def _unit(v: Sequence[Tensor]) -> Vector:
    return vectors.scale(v, 1.0 / vectors.norm(v))


def on_arc(v0: Sequence[Tensor], v1: Sequence[Tensor], a: float) -> Vector:
    """Spherical interpolation between unit vectors, beyond v1 for a > 1; halfway when they are (anti)parallel."""
    psi = torch.arccos(vectors.dot(v0, v1).clamp(-1.0, 1.0))
    sine = torch.sin(psi)
    parallel = sine < 1e-8
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    first = torch.where(parallel, torch.full_like(sine, 0.5), torch.sin((1 - a) * psi) / safe)
    second = torch.where(parallel, torch.full_like(sine, 0.5), torch.sin(a * psi) / safe)
    return vectors.add(vectors.scale(v0, first), vectors.scale(v1, second))


def ignite(
    rho: float = 0.05, r: float = 0.05, epsilon: float = 0.1, eta_lambda: float = 1e-3, lam: float = 0.0
) -> Method:
    """IGNITE: train under the constraint rho ||grad G|| <= epsilon on a surrogate's mean output G (arXiv 2503.04242).

        g = grad L + lam rho / r (grad G(w + r u) - grad G(w)),  u = grad G / ||grad G||
        lam := max(0, lam + eta_lambda (rho ||grad G|| - epsilon))
    the difference standing for the gradient of the norm. ``step(loss_closure, output_closure)``: the second returns
    the model's mean output over the batch, after its backward. The update is that of the authors' code, where the
    multiplier may fall below 0; the multiplier of an inequality does not here. lam: its start.
    """
    non_negative(rho=rho, epsilon=epsilon, eta_lambda=eta_lambda, lam=lam)
    if not r > 0:
        raise UserError(f"r is {r!r}; the finite difference needs r > 0")

    def program(step: Step) -> Program:
        g = yield HERE
        a0 = yield Probe(auxiliary=True)
        size = vectors.norm(a0)
        e = vectors.scale(a0, vectors.ratio(torch.full_like(size, r), size))
        a1 = yield Probe(step.scatter([e[i] for i in step.selected]), auxiliary=True)
        weight = step.memory.values.get("lam", lam) * rho / r
        return Result(vectors.add(g, vectors.sub(a1, a0), weight) if weight else g, [[size]])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        old = step.memory.values.get("lam", lam)
        step.memory.values["lam"] = max(0.0, old + eta_lambda * (rho * float(kept[0][0]) - epsilon))

    return Method(program, remember=remember, keeps=True)


def unlearn(rho: Rho = 0.01, lam: float = 1.0, **ball: Any) -> Method:
    """SAM against relearning: g = grad L_f(w + e) + lam grad L_r(w), e SAM's along grad L_f (arXiv 2502.05374).

    min_w max_{||e|| <= rho} L_f(w + e) + lam L_r(w): what is forgotten stays forgotten nearby, so that a few steps on
    it do not bring it back. ``step(forget_closure, retain_closure)``; L_f is what falls while the model forgets, such
    as `terms.npo`. rho = 0 is the base optimizer on L_f + lam L_r.
    """
    ascent = Ball(rho, **ball)
    non_negative(lam=lam)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        retained = yield Probe(auxiliary=True)
        return vectors.add(g1, retained, lam)

    return Method(program, ascent)
