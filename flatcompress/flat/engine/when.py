"""WHEN: which steps do the extra work. Any method takes one; a step that is left out is a plain one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from flatcompress.errors import UserError
from flatcompress.flat.methods.method import When, always
from flatcompress.randomness import mixed
from flatcompress.registry import Registry


def interval(interval: int = 2, phase: int = -1) -> When:
    """Every ``interval``-th step: those with ``(t - phase) % interval == 0``, t from 0; by default the last of each."""
    if interval < 1:
        raise UserError(f"interval is {interval!r}; it must be a whole number >= 1 (1 = every step)")
    return lambda step: (step.t - phase) % interval == 0


def bernoulli(probability: float = 0.5) -> When:
    """Each step with this probability (RST, arXiv 2203.09962). Seed and step decide, so a resumed run repeats it."""
    if not 0 <= probability <= 1:
        raise UserError(f"probability is {probability!r}; it must lie in 0..1")
    return lambda step: random.Random(mixed(step.seed, step.t)).random() < probability


def window(start: int = 0, end: int | None = None) -> When:
    """Steps ``start <= t < end``; to the end of training when ``end`` is None (SAM late or early in training)."""
    if start < 0 or (end is not None and end < start):
        raise UserError(f"window is {start}..{end}; it needs 0 <= start <= end")
    return lambda step: step.t >= start and (end is None or step.t < end)


@dataclass(frozen=True)
class Facts:
    """``short``: can be asked for as an option of that name, ``interval=2`` for ``when=interval(2)``."""

    short: bool = False


WHEN: Registry[Facts] = Registry("policy", Facts)
WHEN.add("always", lambda: always, "every step")
WHEN.add("interval", interval, "every k-th step", short=True)
WHEN.add("bernoulli", bernoulli, "each step with a probability", "2203.09962", short=True)
WHEN.add("window", window, "the steps from start to end")
