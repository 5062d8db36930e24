"""One-pass methods: the direction is known before the gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import HERE, Probe, Program, Step
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method

DIRECTIONS = ("gradient", "step", "momentum")


def msam(rho: Rho | None = None, weight_decay: str = "published", **ball: Any) -> Method:
    """Momentum-SAM: g = grad L(w - rho v / ||v||), v the base optimizer's momentum (arXiv 2401.12033, algorithm 1).

    The first step, without momentum yet, is a plain one. rho: 0.3 for SGD and 1 for Adam when None (the radius is
    larger than SAM's; the published runs go up to 3). weight_decay: ``published`` decays at the perturbed weights
    (SGD) or after the update (AdamW), ``base`` leaves it to the base optimizer. Needs a base with momentum.
    """
    if weight_decay not in ("published", "base"):
        raise unknown("weight_decay", weight_decay, ("published", "base"))
    sgd, adam = (Ball(default if rho is None else rho, **ball) for default in (0.3, 1.0))

    def program(step: Step) -> Program:
        v = momentum(step)
        if v is None:
            return (yield HERE)
        ascent = adam if uses_adam(step) else sgd
        e = ascent(step, vectors.scale(v, -1.0))
        g1 = yield Probe(e)
        return _decayed_there(step, g1, e) if weight_decay == "published" and not decoupled(step) else g1

    def update(step: Step, kept: Sequence[Vector], combined: Vector, apply: Callable[[], None]) -> None:
        if weight_decay == "base" or not decoupled(step):
            apply()
        else:
            _decay_after(step, apply)

    def check(step: Step) -> None:
        moving = [g for g in step.base.param_groups if g.get("momentum") or "betas" in g]
        if not moving:
            raise UserError(
                f"msam climbs along the base optimizer's momentum and {type(step.base).__name__} has none here; "
                "set momentum (SGD(..., momentum=0.9)) or use Adam or AdamW"
            )

    return Method(program, sgd, update=update, check=check)


def uses_adam(step: Step) -> bool:
    """Does the base keep ``exp_avg`` (Adam and its kin) rather than a momentum buffer?"""
    return any("betas" in group for group in step.base.param_groups)


def decoupled(step: Step) -> bool:
    """Does the base decay weights apart from the gradient, as AdamW does?"""
    return isinstance(step.base, torch.optim.AdamW) or any(
        group.get("decoupled_weight_decay") for group in step.base.param_groups
    )


def momentum(step: Step) -> Vector | None:
    """The base optimizer's momentum, zeros where a parameter has none; None before its first step."""
    found = [_momentum_of(step.base.state.get(p, {})) for p in step.params]
    if all(v is None for v in found):
        return None
    return [torch.zeros_like(p) if v is None else v for p, v in zip(step.params, found)]


def _momentum_of(state: dict[str, Any]) -> Tensor | None:
    for key in ("momentum_buffer", "exp_avg"):
        if isinstance(state.get(key), Tensor):
            return state[key]
    return None


def _decayed_there(step: Step, gradient: Vector, e: Sequence[Tensor | None]) -> Vector:
    """The base adds decay * w to the gradient; adding decay * e here makes it decay * (w + e)."""
    decays = [step.option(i, "weight_decay", 0.0) for i in range(len(step.params))]
    return [g if d is None or not k else g.add(d, alpha=k) for g, d, k in zip(gradient, e, decays)]


def _decay_after(step: Step, apply: Callable[[], None]) -> None:
    """w := (w - update) (1 - lr decay): the base's own decay, which comes before, is held at 0 meanwhile."""
    decays = [group.get("weight_decay", 0.0) for group in step.base.param_groups]
    for group in step.base.param_groups:
        group["weight_decay"] = 0.0
    try:
        apply()
    finally:
        for group, decay in zip(step.base.param_groups, decays):
            group["weight_decay"] = decay
    for i, p in enumerate(step.params):
        if p.grad is not None:
            p.mul_(1 - step.rate(i) * step.option(i, "weight_decay", 0.0))


def dpsat(rho: Rho = 0.05, direction: str = "gradient", **ball: Any) -> Method:
    """DP-SAT: e = rho g_{t-1} / ||g_{t-1}||, the gradient of the last step (arXiv 2306.05651, algorithm 1).

    With an opacus ``DPOptimizer`` as base the stored gradient is its clipped and noised one, so the perturbation costs
    no privacy. direction: ``gradient``, or ``step`` (``momentum`` in the authors' code) for the last
    move w_{t-1} - w_t. The first step is a plain one.
    """
    ascent = Ball(rho, **{"tiny": 1e-16, **ball})
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)

    def program(step: Step) -> Program:
        last = step.recall("last")
        if last is None:
            return (yield HERE)
        along = last if direction == "gradient" else vectors.sub(last, step.weights)
        return (yield Probe(ascent(step, along)))

    def update(step: Step, kept: Sequence[Vector], combined: Vector, apply: Callable[[], None]) -> None:
        private = hasattr(step.base, "pre_step")
        before = vectors.clone(combined if direction == "gradient" else step.weights)
        apply()
        if private and direction == "gradient":
            before = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in step.params]
        step.store("last", before)

    return Method(program, ascent, update=update)
