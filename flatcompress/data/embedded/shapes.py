"""Twelve plane shapes as signed distance fields: negative inside, positive outside, about unit size.

A field f(x, y) takes float64 coordinates of any shape, y pointing down, and returns the distance to the outline: exact
near the edges, a lower bound off the corners. Union is a minimum, intersection a maximum, a band around the
outline is ``abs(f) - width``, which is all that the drawing needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def disc(x: Tensor, y: Tensor, radius: float = 0.8) -> Tensor:
    """A circle's inside."""
    return torch.hypot(x, y) - radius


def box(x: Tensor, y: Tensor, left: float, top: float, right: float, bottom: float) -> Tensor:
    """A rectangle between two corners."""
    across = (x - (left + right) / 2).abs() - (right - left) / 2
    along = (y - (top + bottom) / 2).abs() - (bottom - top) / 2
    return torch.maximum(across, along)


def regular(x: Tensor, y: Tensor, sides: int, inradius: float) -> Tensor:
    """A regular polygon with a corner straight up."""
    turn = 2 * math.pi / sides
    # Fold every sector onto the first: there the outline is one line, at ``inradius`` from the centre.
    angle = torch.remainder(torch.atan2(x, -y), turn) - turn / 2
    return torch.hypot(x, y) * angle.cos() - inradius


def square(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y, -0.7, -0.7, 0.7, 0.7)


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return regular(x, y - 0.2, 3, 0.5)


def star(x: Tensor, y: Tensor, outer: float = 1.0, inner: float = 0.42) -> Tensor:
    """Five points; half a point is one line between an outer and an inner corner."""
    turn = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + turn / 2, turn) - turn / 2).abs()
    radius = torch.hypot(x, y)
    tip, notch = (outer, 0.0), (inner * math.cos(turn / 2), inner * math.sin(turn / 2))
    length = math.hypot(tip[0] - notch[0], notch[1])
    normal = (notch[1] / length, (tip[0] - notch[0]) / length)
    return (radius * angle.cos() - tip[0]) * normal[0] + radius * angle.sin() * normal[1]


def cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, -0.27, -0.85, 0.27, 0.85), box(x, y, -0.85, -0.27, 0.85, 0.27))


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.6).abs() - 0.2


def crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(disc(x - 0.1, y, 0.85), -disc(x - 0.55, y, 0.68))


def half_disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(disc(x, y - 0.4, 0.9), y - 0.4)


def arrow(x: Tensor, y: Tensor) -> Tensor:
    """Pointing up: a triangular head on a shaft."""
    flank = (x.abs() * 0.95 + (y + 0.95) * -0.7) / math.hypot(0.95, 0.7)
    head = torch.maximum(flank, y)
    return torch.minimum(head, box(x, y, -0.2, -0.3, 0.2, 0.9))


def hexagon(x: Tensor, y: Tensor) -> Tensor:
    return regular(x, y, 6, 0.74)


def letter_l(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, -0.65, -0.85, -0.15, 0.85), box(x, y, -0.65, 0.35, 0.65, 0.85))


def letter_t(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(box(x, y, -0.75, -0.85, 0.75, -0.37), box(x, y, -0.25, -0.85, 0.25, 0.85))


SHAPES: dict[str, Field] = {
    "disc": disc,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "ring": ring,
    "crescent": crescent,
    "half disc": half_disc,
    "arrow": arrow,
    "hexagon": hexagon,
    "L": letter_l,
    "T": letter_t,
}


def distances(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[B, H, W]: for every image the field of its class (``labels`` int64 [B], positions in `SHAPES`) at its points."""
    out = torch.empty_like(x)
    for number, field in enumerate(SHAPES.values()):
        members = labels == number
        out[members] = field(x[members], y[members])
    return out
