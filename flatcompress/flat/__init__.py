"""Flat minima: sharpness-aware optimizers, weight averaging and sharpness measures.

This room knows nothing of quantizers, pruning or recipes. `create` wraps any ``torch.optim`` optimizer; the methods
are the rows of `METHODS`; stages plug into the slots ``compose``, ``radius`` and ``perturbed``.
"""

from __future__ import annotations

from flatcompress.flat import averaging, curvature, guards, landscape, masked, radius, sharpness, terms, trust, when
from flatcompress.flat.ball import Ball
from flatcompress.flat.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.create import create
from flatcompress.flat.engine import FlatOptimizer
from flatcompress.flat.method import Method
from flatcompress.flat.methods import COMBINATIONS, METHODS

__all__ = [
    "COMBINATIONS",
    "HERE",
    "METHODS",
    "Ball",
    "FlatOptimizer",
    "Method",
    "Probe",
    "Program",
    "Result",
    "Step",
    "averaging",
    "create",
    "curvature",
    "guards",
    "landscape",
    "masked",
    "radius",
    "sharpness",
    "terms",
    "trust",
    "when",
]
