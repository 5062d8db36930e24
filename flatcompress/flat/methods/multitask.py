"""Flat minima of several losses at once: each task climbs for itself, and their gradients are put together by part."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import Probe, Program, Step
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method
from flatcompress.randomness import mixed

Aggregate = Callable[[Sequence[Vector], int], Vector]


def mean(gradients: Sequence[Vector], seed: int = 0) -> Vector:
    """The mean of the tasks' gradients."""
    total = gradients[0]
    for gradient in gradients[1:]:
        total = vectors.add(total, gradient)
    return total if len(gradients) == 1 else vectors.scale(total, 1 / len(gradients))


def pcgrad(gradients: Sequence[Vector], seed: int = 0) -> Vector:
    """PCGrad (arXiv 2001.06782, algorithm 1): each gradient without its parts against the others', then their mean.

    The others are gone through in an order that ``seed`` decides. (The paper adds; the mean keeps the learning rate.)
    """
    order = list(range(len(gradients)))
    changed = []
    for i, gradient in enumerate(gradients):
        random.Random(mixed(seed, i)).shuffle(order)
        for j in order:
            against = vectors.dot(gradient, gradients[j])
            if j != i and bool(against < 0):
                size = vectors.dot(gradients[j], gradients[j])
                gradient = vectors.sub(gradient, vectors.scale(gradients[j], against / size))
        changed.append(gradient)
    return mean(changed)


AGGREGATES: Mapping[str, Aggregate] = {"mean": mean, "pcgrad": pcgrad}


def fmtl(rho: Rho = 0.05, aggregate: str | Aggregate = "pcgrad", **ball: Any) -> Method:
    """F-MTL: task-based flat regions: SAM for every task, its gradient aggregated by part (arXiv 2211.13723).

    For task i: g_i = grad L_i(w), h_i = grad L_i(w + rho g_i / ||g_i||) - g_i. On what the tasks share
        g = aggregate(g_1 ... g_m) + aggregate(h_1 ... h_m),
    the direction of lower losses and that of flatter ones, each freed of its own conflicts. A parameter that one task
    alone reaches (its head) moves by that task's g_i + h_i. Give ``step`` one closure per task, with its own backward;
    losses count equally (everything is on the scale of their mean). aggregate: ``pcgrad``, ``mean``, or a function of
    (gradients, seed).
    """
    ascent = Ball(rho, **ball)
    if not callable(aggregate) and aggregate not in AGGREGATES:
        raise unknown("aggregate", aggregate, AGGREGATES)
    combine = aggregate if callable(aggregate) else AGGREGATES[aggregate]

    def program(step: Step) -> Program:
        losses, rises = [], []
        for i in range(step.parts):
            losses.append((yield Probe(part=i)))
        reached = [sum(there) for there in zip(*step.present)]
        for i, g in enumerate(losses):
            rises.append(vectors.sub((yield Probe(ascent(step, g), part=i)), g))
        seed = mixed(step.seed, step.t)
        return vectors.add(_by_owner(losses, reached, combine, seed), _by_owner(rises, reached, combine, seed))

    return Method(program, ascent, joint=True)


def _by_owner(gradients: Sequence[Vector], reached: Sequence[int], combine: Aggregate, seed: int) -> Vector:
    """Aggregated where several tasks reach, the mean (of one gradient and zeros) where one does."""
    if len(gradients) == 1:
        return gradients[0]
    shared = [i for i, count in enumerate(reached) if count > 1]
    whole = mean(gradients)
    if shared:
        parts = combine([[g[i] for i in shared] for g in gradients], seed)
        if len(parts) != len(shared) or any(p.shape != whole[i].shape for p, i in zip(parts, shared)):
            raise UserError("the aggregate function must return one tensor per parameter, shaped like the gradients")
        for i, part in zip(shared, parts):
            whole[i] = part
    return whole
