"""Four ways to draw a shape: photo, art, cartoon, sketch. A block of images at once, in float64.

Float64 because what is stored has 8 bits: a last-digit difference between two processors' sines then practically
never changes a pixel, while in float32 it would now and then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flatcompress.data.embedded.shapes import distances


@dataclass(frozen=True)
class Canvas:
    """What a style draws on: the pixel grid of [-1, 1]^2 and the generator all its draws come from."""

    labels: Tensor  # int64 [B]
    size: int
    draw: Generator

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def pixel(self) -> float:
        """A pixel's width."""
        return 2 / self.size

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float64 [B, *shape]."""
        return torch.rand(self.count, *shape, generator=self.draw, dtype=torch.float64) * (high - low) + low

    def grid(self) -> tuple[Tensor, Tensor]:
        """x [1, 1, W] and y [1, H, 1] of the pixel centres."""
        axis = (torch.arange(self.size, dtype=torch.float64) + 0.5) * self.pixel - 1
        return axis.view(1, 1, -1), axis.view(1, -1, 1)

    def waves(self, number: int, low: float, high: float) -> Tensor:
        """Smooth noise [B, H, W] in -1..1: the mean of ``number`` plane waves of random direction and frequency."""
        x, y = self.grid()
        out = torch.zeros(self.count, self.size, self.size, dtype=torch.float64)
        for _ in range(number):
            angle, phase = self.uniform(0, 2 * math.pi, 2, 1, 1).unbind(1)
            frequency = self.uniform(low, high, 1, 1)
            out += (frequency * (angle.cos() * x + angle.sin() * y) + phase).sin()
        return out / number

    def noise(self, channels: int, deviation: float) -> Tensor:
        """Independent noise [B, C, H, W] in every pixel."""
        shape = (self.count, channels, self.size, self.size)
        return torch.randn(shape, generator=self.draw, dtype=torch.float64) * deviation

    def shape(self, wobble: float) -> Tensor:
        """The signed distance [B, H, W] to the shape in a random pose; ``wobble`` bends its outline."""
        x, y = self.grid()
        if wobble:
            x, y = x + wobble * self.waves(2, 4, 8), y + wobble * self.waves(2, 4, 8)
        scale, aspect = self.uniform(0.55, 0.95, 1, 1), self.uniform(0.8, 1.25, 1, 1).sqrt()
        turn = self.uniform(-math.radians(40), math.radians(40), 1, 1)
        shift = self.uniform(-0.2, 0.2, 2, 1, 1)
        x, y = x - shift[:, 0], y - shift[:, 1]
        across, along = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x
        return scale * distances(self.labels, across / (scale * aspect), along / scale * aspect)

    def cover(self, distance: Tensor, softness: float = 0.0) -> Tensor:
        """How much of a pixel lies inside, [B, 1, H, W] in 0..1; a soft edge is ``softness`` wider than a pixel."""
        return (0.5 - distance / (self.pixel + softness)).clamp(0, 1).unsqueeze(1)

    def two_colours(self, gap: float, whole: bool) -> tuple[Tensor, Tensor]:
        """Colours [B, 3, 1, 1] that differ by ``gap`` or more in every channel.

        ``whole``: one of the two is lighter in all channels; else they may differ in hue and be equally light.
        """
        middle = (1 - gap) / 2
        dark, light = self.uniform(0, middle, 3, 1, 1), self.uniform(1 - middle, 1, 3, 1, 1)
        swap = self.uniform(0, 1, 1 if whole else 3, 1, 1) < 0.5
        return torch.where(swap, light, dark), torch.where(swap, dark, light)


def photo(canvas: Canvas) -> Tensor:
    """A lit thing before a blurred scene: soft edges, smooth colour noise, a light gradient, a shadow, grain."""
    distance = canvas.shape(0.0)
    under, over = canvas.two_colours(0.2, whole=True)
    under = under + 0.22 * torch.stack([canvas.waves(3, 1, 5) for _ in range(3)], 1)
    over = over + 0.14 * torch.stack([canvas.waves(3, 1, 5) for _ in range(3)], 1)
    shadow = canvas.cover(distance - 0.05, 0.3) * canvas.uniform(0.0, 0.4, 1, 1, 1)
    inside = canvas.cover(distance, 0.1)
    scene = under * (1 - shadow) * (1 - inside) + over * inside
    x, y = canvas.grid()
    angle = canvas.uniform(0, 2 * math.pi, 1, 1)
    light = 1 + canvas.uniform(0.0, 0.35, 1, 1) * (angle.cos() * x + angle.sin() * y)
    return scene * light.unsqueeze(1) + canvas.noise(3, 0.04)


def art(canvas: Canvas) -> Tensor:
    """Paint: a colour textured by brush strokes on another, a wobbly outline."""
    distance = canvas.shape(0.05)
    under, over = canvas.two_colours(0.3, whole=False)
    inside = canvas.cover(distance, 0.03)
    return _strokes(canvas, under) * (1 - inside) + _strokes(canvas, over) * inside


def _strokes(canvas: Canvas, colour: Tensor) -> Tensor:
    """A colour whose channels rise and fall along one bent wave.

    Waves of amplitude 0.3 and more outweigh the contrast between the two paints, and a net that never saw them
    is then near chance on this style.
    """
    x, y = canvas.grid()
    angle, phase = canvas.uniform(0, 2 * math.pi, 2, 1, 1).unbind(1)
    bend = 0.12 * canvas.waves(2, 2, 5)
    wave = (canvas.uniform(8, 16, 1, 1) * (angle.cos() * x + angle.sin() * y + bend) + phase).sin()
    return colour + canvas.uniform(0.04, 0.2, 3, 1, 1) * wave.unsqueeze(1)


def cartoon(canvas: Canvas) -> Tensor:
    """Flat posterised colours and a black outline."""
    distance = canvas.shape(0.0)
    under, over = ((colour * 3).round() / 3 for colour in canvas.two_colours(0.2, whole=False))
    inside = canvas.cover(distance)
    line = canvas.cover(distance.abs() - canvas.uniform(0.05, 0.09, 1, 1))
    return (under * (1 - inside) + over * inside) * (1 - line)


def sketch(canvas: Canvas) -> Tensor:
    """A grey pencil line of uneven pressure on grainy paper, now and then hatched; no colour at all."""
    distance = canvas.shape(0.03)
    width = canvas.uniform(0.02, 0.05, 1, 1)
    pressure = 0.8 + 0.2 * canvas.waves(3, 2, 6)
    line = canvas.cover(distance.abs() - width, 0.04) * pressure.unsqueeze(1)
    x, y = canvas.grid()
    lean = canvas.uniform(-0.6, 0.6, 1, 1)
    hatch = (canvas.uniform(16, 24, 1, 1) * (x + lean * y)).sin().clamp(min=0).unsqueeze(1)
    hatched = (canvas.uniform(0, 1, 1, 1, 1) < 0.5) * canvas.uniform(0.1, 0.35, 1, 1, 1)
    strokes = torch.maximum(line, canvas.cover(distance) * hatch * hatched)
    paper, pencil = canvas.uniform(0.85, 0.98, 1, 1, 1), canvas.uniform(0.5, 0.8, 1, 1, 1)
    return (paper - pencil * strokes + canvas.noise(1, 0.025)).expand(-1, 3, -1, -1)


STYLES: dict[str, Callable[[Canvas], Tensor]] = {"photo": photo, "art": art, "cartoon": cartoon, "sketch": sketch}


def paint(style: str, labels: Tensor, size: int, draw: Generator) -> Tensor:
    """uint8 [B, 3, size, size]: one image of each class in ``labels`` (int64 [B]), every draw from ``draw``."""
    image = STYLES[style](Canvas(labels, size, draw))
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)
