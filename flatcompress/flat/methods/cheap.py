"""SAM at less than two passes a step: on the hardest samples only, or with the second pass's share of the last ones."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.engine.hyper import non_negative, share
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.masked import ALL_SAMPLES
from flatcompress.flat.methods.method import Method
from flatcompress.randomness import mixed


def ksam(rho: Rho = 0.05, top: float = 1 / 3, **ball: Any) -> Method:
    """K-SAM: both gradients of SAM on the share ``top`` of the batch with the largest losses (arXiv 2210.12864).

    One forward over the batch finds them; with a third a step costs what a plain one does (a backward pass taken for
    two forwards). The samples are seen through a closure with a parameter ``keep``, as in `esam`; with a plain closure
    all are used, which a warning says.
    """
    ascent = Ball(rho, **ball)
    if not 0 < top <= 1:
        raise UserError(f"top is {top!r}; the share of samples that are used must lie in 0 < top <= 1")

    def program(step: Step) -> Program:
        if not step.selective():
            if step.t == 0:
                warnings.warn(ALL_SAMPLES.format("ksam"), stacklevel=2)
            return (yield Probe(ascent(step, (yield HERE))))
        yield Probe(backward=False)
        hardest = largest_losses(step.losses[-1], top)
        g0 = yield Probe(keep=hardest)
        return (yield Probe(ascent(step, g0), keep=hardest))

    return Method(program, ascent, selects=True)


def largest_losses(losses: Tensor, top: float) -> Tensor:
    """Indices, in order, of the share ``top`` of samples (at least one) with the largest ``losses`` [B].

    >>> largest_losses(torch.tensor([0.1, 0.9, 0.4, 0.7]), 0.5)
    tensor([1, 3])
    """
    if losses.dim() == 0:
        raise UserError("the closure takes `keep` but returned one number; return the losses of all samples")
    return torch.topk(losses, max(1, round(top * len(losses)))).indices.sort().values


@dataclass(frozen=True)
class Sampling:
    """How often vSAM takes the second pass: ``rate`` of the ``window`` steps, adapted after each window.

        rate := rate (1 + alpha_norm c_norm + alpha_var c_var), within 1..max_share window
    c is the mean relative change, within -1..1, from one sampled step to the next: of ||PSF|| / ||g0||, and of the
    variance of ||PSF|| (of the last ``window`` in order, by blocks, averaged).
    """

    window: int = 50
    blocks: int = 5
    max_share: float = 0.8
    alpha_norm: float = 0.13
    alpha_var: float = 0.13

    def __post_init__(self) -> None:
        non_negative(alpha_norm=self.alpha_norm, alpha_var=self.alpha_var)
        if min(self.window, self.blocks) < 1 or not 1 <= self.max_share * self.window <= self.window:
            raise UserError(
                f"window is {self.window}, blocks {self.blocks} and max_share {self.max_share}; vsam needs window and "
                "blocks >= 1, and max_share * window between 1 and window"
            )

    def next(self, rate: float, ratios: Sequence[float], variances: Sequence[float]) -> float:
        """The rate of the next window."""
        grown = rate * (1 + self.alpha_norm * change(ratios) + self.alpha_var * change(variances))
        return min(max(grown, 1.0), self.max_share * self.window)

    def variance(self, norms: Sequence[float]) -> float:
        """The mean over blocks of the sorted norms of the variance in a block; 0 while a block has less than two."""
        size, order = len(norms) // self.blocks, sorted(norms)
        if size < 2:
            return 0.0
        return statistics.mean(statistics.variance(order[j * size : (j + 1) * size]) for j in range(self.blocks))


def change(values: Sequence[float]) -> float:
    """The mean relative change from one value to the next, within -1..1; from a zero nothing can be said.

    >>> change([1.0, 1.5, 0.75]), change([0.0, 2.0]), change([1.0, 10.0])
    (0.0, 0.0, 1.0)
    """
    changes = [(b - a) / a for a, b in pairwise(values) if a]
    return min(max(statistics.mean(changes), -1.0), 1.0) if changes else 0.0


def vsam(
    rho: Rho = 0.05,
    beta: float = 0.7,
    reuse: int = 6,
    warmup: int = 50,
    window: int = 50,
    blocks: int = 5,
    max_share: float = 0.8,
    alpha_norm: float = 0.13,
    alpha_var: float = 0.13,
    last: int = 10,
    **ball: Any,
) -> Method:
    """vSAM: SAM's own part PSF = g1 - g0 is taken at some steps and reused, fading, at others (arXiv 2403.08821).

    A sampled step is SAM's. The j-th step after it has g = g0 + beta^j PSF for j <= ``reuse``, later ones are plain.
    Every window has as many sampled steps as its rate says, at random, the missing ones at its end; the rate follows
    how much PSF varies (`Sampling`), its norms taken over the ``last`` parameters. Update, schedule and their numbers
    are those of the authors' code; there the first three epochs are SAM, here the first ``warmup`` steps.
    """
    ascent = Ball(rho, **ball)
    share("beta", beta)
    if min(reuse, warmup) < 0 or last < 1:
        raise UserError(f"vsam needs reuse, warmup >= 0 and last >= 1; found {reuse}, {warmup} and {last}")
    sampling = Sampling(window, blocks, max_share, alpha_norm, alpha_var)

    def sampled(step: Step) -> bool:
        if step.t < warmup:
            return True
        values = step.memory.values
        quota, used = int(values.get("rate", 1.0)), values.get("used", 0)
        lucky = random.Random(mixed(step.seed, step.t)).random() < values.get("rate", 1.0) / window
        left = window - (step.t - warmup) % window
        return (used < quota and lucky) or left <= quota - used

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return Result(g1, [g0, g1])

    def otherwise(step: Step) -> Program:
        g0 = yield HERE
        psf, age = step.recall("psf"), step.memory.values.get("age", 0)
        return g0 if psf is None or age >= reuse else vectors.add(g0, psf, beta ** (age + 1))

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        values = step.memory.values
        if kept:
            psf = vectors.sub(kept[1], kept[0])
            step.store("psf", psf)
            _record(values, sampling, float(vectors.norm(psf[-last:])), float(vectors.norm(kept[0][-last:])))
        values["age"] = 0 if kept else values.get("age", 0) + 1
        values["used"] = values.get("used", 0) + bool(kept)
        if step.t + 1 >= warmup and (step.t + 1 - warmup) % window == 0:
            rate = values.get("rate", 1.0)
            if step.t >= warmup:
                rate = sampling.next(rate, values.get("ratios", ()), values.get("variances", ()))
            values.update(rate=rate, used=0)

    return Method(program, ascent, sampled, otherwise, remember, keeps=True)


def _record(values: dict[str, Any], sampling: Sampling, psf: float, g0: float) -> None:
    """Append what a sampled step found to the last ``window`` of each; new lists, so that a failed step leaves none."""
    norms = [*values.get("norms", ()), psf][-sampling.window :]
    values["norms"] = norms
    values["ratios"] = [*values.get("ratios", ()), psf / g0 if g0 else 0.0][-sampling.window :]
    values["variances"] = [*values.get("variances", ()), sampling.variance(norms)][-sampling.window :]
