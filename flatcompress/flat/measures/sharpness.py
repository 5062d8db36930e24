"""Sharpness measures: how much the loss rises around the weights. Exact definitions, one function each.

All of them take ``(model, batches, loss)``: a module, an iterable of ``(inputs, targets)`` and ``loss(logits,
targets) -> scalar``. The model is put into evaluation mode and left exactly as it was found. A measure over several
batches of m samples is the m-sharpness: the mean over batches of the value on each.

Sharpness does not correlate reliably with generalization across setups (arXiv 2302.07011): compare only models that
were trained by one recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.measures.attack import Region, worst_loss
from flatcompress.flat.measures.measuring import Batches, Choice, Loss, Probed, listed, normalized_logits, probed
from flatcompress.modules import logits_of
from flatcompress.randomness import spaced
from flatcompress.registry import Registry

__all__ = [
    "MEASURES",
    "average_case",
    "directional",
    "layerwise",
    "logit_space",
    "normalized_logits",
    "one_step",
    "report",
    "sharpness",
    "worst_case",
]


def one_step(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    normalize_logits: bool = False,
    perturbed: Choice | None = None,
) -> float:
    """L(w + e) - L(w) with SAM's e, or that of the ``|w|`` geometry when adaptive; one gradient a batch."""
    _check_rho(rho)
    with probed(model, loss, normalize_logits=normalize_logits, perturbed=perturbed) as at:
        return _mean([_rise(at, x, y, rho, adaptive) for x, y in listed(batches, model)])


def _rise(at: Probed, x: Tensor, y: Tensor, rho: float, adaptive: bool) -> float:
    before, gradient = at.gradient(x, y)
    return at.at(_ascent(at.params, gradient, rho, adaptive), x, y) - before


def _ascent(params: Sequence[Tensor], gradient: Vector, rho: float, adaptive: bool) -> Vector:
    """rho T^2 g / ||T g|| with T = 1, or |w| when adaptive."""
    c = [p.detach().abs() for p in params] if adaptive else None
    inner = gradient if c is None else vectors.mul(gradient, c)
    outer = inner if c is None else vectors.mul(inner, c)
    return vectors.scale(outer, rho / (vectors.norm(inner) + 1e-12))


def worst_case(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    rho: float = 0.01,
    *,
    norm: str = "linf",
    adaptive: bool = False,
    steps: int = 20,
    restarts: int = 1,
    random_start: bool = False,
    normalize_logits: bool = False,
    perturbed: Choice | None = None,
    seed: int = 0,
) -> float:
    """The mean over batches of max L(w + d) - L(w) over ``||d / c|| <= rho``, by Auto-PGD (arXiv 2302.07011).

    norm: ``l2`` or ``linf``. adaptive: c = |w| instead of 1. restarts > 1 needs ``random_start``.
    """
    _check_rho(rho)
    if norm not in ("l2", "linf"):
        raise unknown("norm", norm, ("l2", "linf"))
    if restarts > 1 and not random_start:
        raise UserError(f"restarts is {restarts} but every run starts at w: pass random_start=True")
    rises = []
    with probed(model, loss, normalize_logits=normalize_logits, perturbed=perturbed) as at:
        region = Region(norm, rho, [p.detach().abs() for p in at.params] if adaptive else None)
        for b, (x, y) in enumerate(listed(batches, model)):
            starts = [region.start(_copies(at), spaced(seed, b) + r) if random_start else None for r in range(restarts)]
            worst = max(worst_loss(at, region, x, y, steps, start) for start in starts)
            rises.append(worst - at.at([torch.zeros_like(p) for p in at.params], x, y))
    return _mean(rises)


def average_case(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    rho: float = 0.01,
    *,
    norm: str = "l2",
    adaptive: bool = False,
    draws: int = 20,
    normalize_logits: bool = False,
    perturbed: Choice | None = None,
    noise: Callable[[int, Sequence[Tensor]], Sequence[Tensor]] | None = None,
    seed: int = 0,
) -> float:
    """The mean over batches and draws of L(w + d) - L(w); d = rho c N(0, 1), or uniform in the box for linf.

    The draws are not rescaled to a sphere. ``noise(j, params)`` replaces draw j before scaling.
    """
    _check_rho(rho)
    if norm not in ("l2", "linf"):
        raise unknown("norm", norm, ("l2", "linf"))
    rises: list[float] = []
    with probed(model, loss, normalize_logits=normalize_logits, perturbed=perturbed) as at:
        region = Region(norm, rho, [p.detach().abs() for p in at.params] if adaptive else None)
        for x, y in listed(batches, model):
            before = at.at([torch.zeros_like(p) for p in at.params], x, y)
            for j in range(draws):
                if noise is None:
                    d = region.start(_copies(at), spaced(seed, len(rises)) + j)
                else:
                    d = vectors.scale([n.to(p) for n, p in zip(noise(j, at.params), at.params)], rho)
                    d = d if region.c is None else vectors.mul(d, region.c)
                rises.append(at.at(d, x, y) - before)
    return _mean(rises)


def logit_space(model: nn.Module, batches: Batches, loss: Loss, epsilon: float = 1e-3, *, steps: int = 10) -> float:
    """The max of ``100 (L(z + d) - L(z)) / (1 + L(z))`` over ``|d| <= epsilon (|z| + 1)`` on logits z (2405.18710).

    Needs no pass through the model beyond one forward a batch: sign ascent in the box around the logits.
    """
    rises = []
    with probed(model, loss) as at:
        for x, y in listed(batches, model):
            with torch.no_grad():
                z = logits_of(at.model(x))
                before = float(loss(z, y))
            rises.append(100 * (_worst_logits(loss, z, y, epsilon, steps) - before) / (1 + before))
    return _mean(rises)


def _worst_logits(loss: Loss, z: Tensor, y: Tensor, epsilon: float, steps: int) -> float:
    box = epsilon * (z.abs() + 1)
    d, best = torch.zeros_like(z), -math.inf
    for i in range(steps):
        point = (z + d).requires_grad_(True)
        (g,) = torch.autograd.grad(loss(point, y), point)
        d = (d + box * (2.0 if i == 0 else 2.0 / (i + 1)) * g.sign()).clamp(-box, box)
        best = max(best, float(loss(z + d, y)))
    return best


def layerwise(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    rho: float = 0.05,
    *,
    measure: str | Callable[..., float] = "one_step",
    **options: Any,
) -> dict[str, float]:
    """The measure with the perturbation restricted to one parameter tensor at a time, by its name."""
    if measure == "one_step":
        return _layerwise_one_step(model, batches, loss, rho, **options)
    held = listed(batches, model)
    run = MEASURES[measure] if isinstance(measure, str) else measure
    chosen = options.pop("perturbed", None)
    names = [n for n, p in model.named_parameters() if p.requires_grad and (chosen is None or chosen(n, p))]
    return {name: run(model, held, loss, rho, perturbed=_only(name), **options) for name in names}


def _layerwise_one_step(
    model: nn.Module, batches: Batches, loss: Loss, rho: float, *, adaptive: bool = False, **options: Any
) -> dict[str, float]:
    """One gradient a batch serves all layers; each then costs one forward."""
    _check_rho(rho)
    with probed(model, loss, **options) as at:
        rises: dict[str, list[float]] = {name: [] for name in at.names}
        for x, y in listed(batches, model):
            before, gradient = at.gradient(x, y)
            for i, name in enumerate(at.names):
                shift: list[Tensor | None] = [None] * len(at.params)
                shift[i] = _ascent([at.params[i]], [gradient[i]], rho, adaptive)[0]
                rises[name].append(at.at(shift, x, y) - before)
    return {name: _mean(values) for name, values in rises.items()}


def _only(name: str) -> Choice:
    return lambda n, p: n == name


def directional(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    direction: str | Sequence[Tensor] = "gradient",
    *,
    perturbed: Choice | None = None,
) -> float:
    """``v'Hv / v'v`` for the direction v of an update (arXiv 2306.00204), H of the mean loss over all batches.

    direction: ``gradient`` (SGD), ``sign`` (sign descent), or one tensor per trainable parameter, such as
    Adam's ``m / sqrt(v)``.
    """
    from flatcompress.flat.measures import curvature

    with probed(model, loss, perturbed=perturbed) as at:
        held = listed(batches, model)
        if not isinstance(direction, str):
            v: Vector = list(direction)
        else:
            v = curvature.full_gradient(at, held)
            if direction == "sign":
                v = [torch.sign(g) for g in v]
            elif direction != "gradient":
                raise unknown("direction", direction, ("gradient", "sign"))
        hv = curvature.hessian_product(at, held, v)
        return float(vectors.ratio(vectors.dot(v, hv), vectors.dot(v, v)))


def sharpness(
    model: nn.Module, batches: Batches, loss: Loss, rho: float = 0.05, *, measure: str = "one_step", **options: Any
) -> float:
    """One number by the name of its measure; see `MEASURES`. ``options`` are those of the measure's function."""
    return float(MEASURES[measure](model, batches, loss, rho, **options))


def report(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    box: float = 0.002,
    steps: int = 20,
    layers: bool = True,
    spectrum: bool = True,
    seed: int = 0,
    logits: bool = True,
) -> dict[str, Any]:
    """Every cheap measure of one model as plain data: what ``flatcompress sharpness`` prints.

    Keys: ``loss``, ``one_step``, ``one_step_adaptive``, ``worst_case`` (adaptive linf, normalised logits: the headline
    number; without ``logits`` the outputs are taken as they are), ``average_case``, ``directional``; with ``spectrum``
    ``hessian_top`` and ``hessian_trace``; with ``layers`` a dictionary ``layers`` of one-step values; ``settings``
    repeats the radii.
    """
    from flatcompress.flat.measures import curvature

    held = listed(batches, model)
    found: dict[str, Any] = {"loss": _plain_loss(model, held, loss)}
    found["one_step"] = one_step(model, held, loss, rho)
    found["one_step_adaptive"] = one_step(model, held, loss, adaptive_rho, adaptive=True)
    found["worst_case"] = worst_case(
        model, held, loss, box, norm="linf", adaptive=True, steps=steps, normalize_logits=logits
    )
    found["average_case"] = average_case(model, held, loss, rho, adaptive=True, seed=seed)
    found["directional"] = directional(model, held, loss)
    if spectrum:
        found["hessian_top"] = curvature.top_eigenvalues(model, held, loss, iterations=20, tolerance=1e-2, seed=seed)[0]
        found["hessian_trace"] = curvature.trace(model, held, loss, draws=10, seed=seed)
    if layers:
        found["layers"] = layerwise(model, held, loss, rho)
    found["settings"] = {
        "rho": rho, "adaptive_rho": adaptive_rho, "box": box, "steps": steps, "batches": len(held),
        "samples": sum(len(x) for x, _ in held), "seed": seed,
    }  # fmt: skip
    return found


def _plain_loss(model: nn.Module, held: Sequence[tuple[Tensor, Tensor]], loss: Loss) -> float:
    with probed(model, loss) as at, torch.no_grad():
        return _mean([float(at.value(x, y)) for x, y in held])


def _copies(at: Probed) -> Vector:
    return [p.detach() for p in at.params]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check_rho(rho: float) -> None:
    if not 0 <= rho < math.inf:
        raise UserError(f"rho is {rho!r}; the radius must be a finite number >= 0")


MEASURES = Registry("sharpness measure")
MEASURES.add("one_step", one_step, "loss rise after one ascent step of length rho", "2010.01412")
MEASURES.add("worst_case", worst_case, "largest loss rise in a ball, by Auto-PGD", "2302.07011")
MEASURES.add("average_case", average_case, "mean loss rise under random noise", "2302.07011")
