"""Methods that perturb only a part of the parameters: a mask, a kind of layer, random tensors, chosen samples."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step, normal
from flatcompress.flat.engine.hyper import share
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method
from flatcompress.randomness import mixed, spaced
from flatcompress.sharded import whole

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MASKS = ("fisher", "dynamic")
LAYERS = ("norm", "other")
ALL_SAMPLES = (
    "{} chooses samples by their losses, and this closure has no parameter `keep`: all samples are used, at the cost "
    "of SAM. Give a closure(keep=None) that returns the losses of the samples in `keep` (None: all) and runs backward "
    "only when torch.is_grad_enabled()"
)


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: torch's own, or one whose class name says so (LlamaRMSNorm, FrozenBatchNorm2d)."""
    return isinstance(module, NORMS) or type(module).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))


def norm_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that normalisation layers own, by module type; parameter names decide nothing."""
    return {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}


def samon(
    rho: Rho = 0.5, eta: float = 0.01, geometry: Any = "elementwise", layers: str = "norm", **ball: Any
) -> Method:
    """SAM-ON: perturb the normalisation layers only, everything is trained (arXiv 2306.04226).

    The norm is taken over what is perturbed, so the radius is exactly rho. layers: ``norm``, or ``other`` for the
    complement. eta, geometry: as in ASAM; ``geometry="plain"`` gives SAM's ball, ``p="inf"`` the sign step.
    """
    ascent = Ball(rho, **{"eta": eta, "geometry": geometry, "tiny": 1e-16, **ball})
    if layers not in LAYERS:
        raise unknown("layers", layers, LAYERS)

    def chosen(step: Step) -> list[int]:
        owned = norm_parameters(step.model)
        return [i for i in step.selected if (id(step.params[i]) in owned) == (layers == "norm")]

    def program(step: Step) -> Program:
        g0 = yield HERE
        return (yield Probe(ascent(replace(step, selected=chosen(step)), g0)))

    def check(step: Step) -> None:
        if not chosen(step):
            warnings.warn(
                f"samon finds no trainable parameter in {layers!r} layers of {type(step.model).__name__}: nothing is "
                "perturbed and the second pass is wasted; use 'sam'",
                stacklevel=3,
            )

    return Method(program, ascent, check=check)


def ssam(
    rho: Rho = 0.05,
    sparsity: float = 0.5,
    mask: Any = "fisher",
    every: int = 100,
    drop: float = 0.5,
    total_steps: int | None = None,
    scores: Callable[[list[nn.Parameter]], Sequence[Tensor]] | None = None,
    **ball: Any,
) -> Method:
    """Sparse SAM: e = m * rho g0 / ||g0||, the norm over all of g0 (NeurIPS 2022, 2210.05177, algorithms 1 and 2).

    sparsity: the share that is not perturbed, over all parameters together. mask: ``fisher`` keeps the entries of the
    largest squared gradient, ``dynamic`` starts at random, drops live entries of small gradient and grows as many
    dead ones at random; or masks by name, a list, or ``mask(params, gradients) -> masks`` of your own. every: steps
    between refreshes. drop: the share dropped by ``dynamic``, cosine-decayed over ``total_steps``. scores:
    ``scores(params)`` replaces the squared batch gradient by, say, `flatcompress.flat.methods.masked.fisher`.
    ``scope="selected"`` takes the norm over the masked gradient instead and keeps the radius at rho.
    """
    ascent = Ball(rho, **{"scope": "all", "tiny": 1e-7, **ball})
    share("sparsity", sparsity)
    share("drop", drop)
    _check_mask(mask, every)

    def refreshed(step: Step, g0: Vector) -> Vector:
        masks = step.recall("mask")
        if masks is not None and step.t % every:
            return masks
        if mask == "fisher":
            if scores is not None and "scores" not in step.scratch:
                step.scratch["scores"] = list(scores(step.params))
            return largest(step.scratch.get("scores") or vectors.mul(g0, g0), 1 - sparsity)
        if masks is None:
            return largest([n.abs() for n in normal(g0, step.seed)], 1 - sparsity)
        return regrown(masks, g0, _drop_rate(drop, step.t, total_steps), spaced(step.seed, step.t))

    def program(step: Step) -> Program:
        g0 = yield HERE
        masks = refreshed(step, g0) if isinstance(mask, str) else mask
        g1 = yield Probe(replace(ascent, mask=masks)(step, g0))
        return Result(g1, [g0])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        # From the mean gradient, so that the mask is one for all micro-batches and processes from the next step on.
        if kept and isinstance(mask, str) and (step.recall("mask") is None or step.t % every == 0):
            step.store("mask", [m.bool() for m in refreshed(step, kept[0])])

    return Method(program, ascent, remember=remember, keeps=True)


def _drop_rate(drop: float, t: int, total_steps: int | None) -> float:
    return drop if total_steps is None else drop / 2 * (1 + math.cos(math.pi * min(1.0, t / total_steps)))


def _check_mask(mask: Any, every: int) -> None:
    if every < 1:
        raise UserError(f"every is {every!r}; it must be a whole number of steps >= 1")
    if isinstance(mask, str) and mask not in MASKS:
        raise unknown("mask", mask, MASKS)


def largest(scores: Sequence[Tensor], kept: float) -> Vector:
    """Boolean masks of the ``kept`` share of entries with the largest score, over all tensors together."""
    flat = torch.cat([whole(s).reshape(-1) for s in scores])
    count = round(kept * flat.numel())
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        chosen[torch.topk(flat, count).indices] = True
    return _split(chosen, scores)


def regrown(masks: Sequence[Tensor], gradient: Sequence[Tensor], rate: float, seed: int) -> Vector:
    """Drop the live entries of smallest |gradient| (a share ``rate`` of them), grow as many dead ones at random."""
    live = torch.cat([whole(m).reshape(-1) for m in masks]).bool()
    size = torch.cat([whole(g).reshape(-1) for g in gradient]).abs()
    count = min(int(rate * int(live.sum())), int((~live).sum()))
    if count:
        dropped = torch.topk(size.masked_fill(~live, math.inf), count, largest=False).indices
        luck = torch.cat([n.reshape(-1) for n in normal(gradient, seed)]).masked_fill(live, -math.inf)
        grown = torch.topk(luck, count).indices
        live = live.clone()
        live[dropped] = False
        live[grown] = True
    return _split(live, masks)


def _split(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    return [part.reshape(t.shape) for part, t in zip(flat.split([t.numel() for t in like]), like)]


def fisher(model: nn.Module, batches: Any, loss: Any) -> Callable[[list[nn.Parameter]], list[Tensor]]:
    """Scores for `ssam`: the sum of squared per-sample gradients over all of ``batches``, in evaluation mode."""
    from flatcompress.flat.measures.measuring import listed, probed

    def scores(params: list[nn.Parameter]) -> list[Tensor]:
        total = {id(p): torch.zeros_like(p) for p in params}
        with probed(model, loss) as at:
            for x, y in listed(batches, model):
                for i in range(len(x)):
                    for p, g in zip(at.params, at.gradient(x[i : i + 1], y[i : i + 1])[1]):
                        if id(p) in total:
                            total[id(p)] += g * g
        return [total[id(p)] for p in params]

    return scores


def esam(rho: Rho = 0.05, beta: float = 0.6, gamma: float = 0.5, **ball: Any) -> Method:
    """ESAM: each tensor is perturbed with probability beta, by e / beta; g1 on the sharpest samples (arXiv 2110.03141).

    Of the n samples those whose loss rose by strictly more than the int(gamma n)-th largest rise are kept. That needs
    losses per sample: a closure with a parameter ``keep`` (indices, or None for all) that returns them and calls
    backward only when ``torch.is_grad_enabled()``. With a plain closure, or gamma = 1, all samples are used.
    """
    ascent = Ball(rho, **{"tiny": 1e-7, **ball})
    share("gamma", gamma)
    if not 0 < beta <= 1:
        raise UserError(f"beta is {beta!r}; it must lie in 0 < beta <= 1 (1 perturbs every tensor)")

    def program(step: Step) -> Program:
        g0 = yield HERE
        # Every tensor moves at the first step: the published code chooses at the end of each.
        subset = step.selected if step.t == 0 else _some(step, beta)
        e = [None if x is None else x / beta for x in ascent(replace(step, selected=subset), g0)]
        before = step.losses[-1]
        if gamma >= 0.99 or not step.selective():
            if gamma < 0.99 and step.t == 0:
                warnings.warn(ALL_SAMPLES.format("esam"), stacklevel=2)
            return (yield Probe(e))
        if before.dim() == 0:
            raise UserError("the closure takes `keep` but returned one number; return the losses of all samples")
        yield Probe(e, backward=False)
        return (yield Probe(e, keep=sharpest(step.losses[-1] - before, gamma)))

    return Method(program, ascent, selects=True)


def _some(step: Step, beta: float) -> list[int]:
    """Each perturbed tensor with probability beta, at least one; seed and step decide."""
    luck = random.Random(mixed(step.seed, step.t))
    drawn = [i for i in step.selected if luck.random() < beta]
    return drawn or step.selected[:1]


def sharpest(rise: Tensor, gamma: float) -> Tensor:
    """Indices of the samples whose loss rose by more than the int(gamma n)-th largest; never none."""
    limit = torch.topk(rise, max(1, int(gamma * len(rise)))).values[-1]
    kept = rise > limit
    return torch.nonzero(kept if bool(kept.any()) else rise >= limit).reshape(-1)
