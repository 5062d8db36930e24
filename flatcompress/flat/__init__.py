"""Flat minima: sharpness-aware optimizers, weight averaging and sharpness measures.

This package knows nothing of quantizers, pruning or recipes. `create` wraps any ``torch.optim`` optimizer; the methods
are the rows of `METHODS`; stages plug into the slots ``compose``, ``radius`` and ``perturbed``.
"""

from __future__ import annotations

from flatcompress.flat import (
    averaging,
    federated,
    inconsistency,
)
from flatcompress.flat.engine import (
    guards,
    radius,
    when,
)
from flatcompress.flat.engine.ball import Ball
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.engine.engine import FlatOptimizer
from flatcompress.flat.factory import create
from flatcompress.flat.measures import (
    connectivity,
    curvature,
    entropy,
    landscape,
    sharpness,
)
from flatcompress.flat.measures.rows import MEASURES
from flatcompress.flat.methods import (
    masked,
    terms,
    trust,
)
from flatcompress.flat.methods.family import COMBINATIONS, METHODS, defaults_by_method, mix_of
from flatcompress.flat.methods.method import Bounds, Facts, Method

__all__ = [
    "COMBINATIONS",
    "HERE",
    "MEASURES",
    "METHODS",
    "Ball",
    "Bounds",
    "Facts",
    "FlatOptimizer",
    "Method",
    "Probe",
    "Program",
    "Result",
    "Step",
    "averaging",
    "connectivity",
    "create",
    "curvature",
    "defaults_by_method",
    "entropy",
    "federated",
    "guards",
    "inconsistency",
    "landscape",
    "masked",
    "mix_of",
    "radius",
    "sharpness",
    "terms",
    "trust",
    "when",
]
