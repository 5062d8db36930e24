"""The loss along random filter-normalised directions, in one or two dimensions, and its picture (arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.context import normal
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.measures.measuring import Batches, Loss, Probed, listed, probed
from flatcompress.randomness import spaced

NORMALIZATIONS = ("filter", "layer", "weight")
SIZE, MARGIN = 480, 56
# Seven stops of a perceptually even dark-to-light map, linear in between.
STOPS = ((68, 1, 84), (70, 50, 126), (54, 92, 141), (39, 127, 142), (31, 161, 135), (122, 209, 81), (253, 231, 37))


@dataclass(frozen=True)
class Landscape:
    """Losses at ``alphas`` (1D: ``loss[i]``; 2D: ``loss[i][j]`` at alphas[i] along the first, alphas[j] the second)."""

    alphas: list[float]
    loss: list[float] | list[list[float]]

    @property
    def plane(self) -> bool:
        """Is it two-dimensional?"""
        return isinstance(self.loss[0], list)


def direction(
    model: nn.Module,
    *,
    normalization: str = "filter",
    seed: int = 0,
    noise: Callable[[int, Sequence[Tensor]], Sequence[Tensor]] | None = None,
    draw: int = 0,
) -> Vector:
    """A random direction, one tensor per trainable parameter, scaled like the weights.

    ``filter``: d_f ||w_f|| / (||d_f|| + 1e-10) for every slice f along dim 0 (rows of a linear layer count as
    filters); ``layer``: the same per tensor; ``weight``: d |w|. Biases and normalisation parameters (1-D) stay put.
    """
    if normalization not in NORMALIZATIONS:
        raise unknown("normalization", normalization, NORMALIZATIONS)
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    raw = list(noise(draw, params)) if noise is not None else normal(params, spaced(seed, draw))
    return [_normalized(d.to(p), p, normalization) for d, p in zip(raw, params)]


def _normalized(d: Tensor, w: Tensor, normalization: str) -> Tensor:
    if w.dim() < 2:
        return torch.zeros_like(w)
    if normalization == "weight":
        return d * w.abs()
    over = tuple(range(1, w.dim())) if normalization == "filter" else tuple(range(w.dim()))
    size = torch.linalg.vector_norm(w, dim=over, keepdim=True)
    return d * size / (torch.linalg.vector_norm(d, dim=over, keepdim=True) + 1e-10)


def line(
    model: nn.Module, batches: Batches, loss: Loss, along: Vector | None = None, *, points: int = 21,
    reach: float = 1.0, alphas: Sequence[float] | None = None, seed: int = 0,
) -> Landscape:  # fmt: skip
    """L(w + a d) for a in -reach..reach; the mean over all samples, in evaluation mode."""
    d = direction(model, seed=seed) if along is None else along
    at_alphas = _alphas(points, reach, alphas)
    with probed(model, loss) as at:
        held = listed(batches, model)
        return Landscape(at_alphas, [_loss(at, held, vectors.scale(d, a)) for a in at_alphas])


def plane(
    model: nn.Module, batches: Batches, loss: Loss, along: tuple[Vector, Vector] | None = None, *, points: int = 11,
    reach: float = 1.0, alphas: Sequence[float] | None = None, seed: int = 0,
) -> Landscape:  # fmt: skip
    """L(w + a d1 + b d2) over a square of two independent directions."""
    d1, d2 = along or (direction(model, seed=seed), direction(model, seed=seed, draw=1))
    at_alphas = _alphas(points, reach, alphas)
    with probed(model, loss) as at:
        held = listed(batches, model)
        rows = [[_loss(at, held, vectors.add(vectors.scale(d1, a), d2, b)) for b in at_alphas] for a in at_alphas]
    return Landscape(at_alphas, rows)


def _alphas(points: int, reach: float, given: Sequence[float] | None) -> list[float]:
    if given is not None:
        return [float(a) for a in given]
    if points < 2 or reach <= 0:
        raise UserError(f"points is {points!r} and reach {reach!r}; a landscape needs points >= 2 and reach > 0")
    return [-reach + 2 * reach * i / (points - 1) for i in range(points)]


def _loss(at: Probed, held: Sequence[tuple[Tensor, Tensor]], shift: Vector) -> float:
    count = sum(len(x) for x, _ in held)
    return sum(at.at(shift, x, y) * len(x) for x, y in held) / count


def picture(landscape: Landscape, title: str = "") -> Image.Image:
    """Draw it: a curve for one dimension, a colour map for two, with the range of the loss written beside."""
    image = Image.new("RGB", (SIZE + 2 * MARGIN, SIZE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    flat = _flat(landscape)
    low, high = min(flat), max(flat)
    if landscape.plane:
        _paint(image, landscape, low, high)
    else:
        _curve(draw, landscape, low, high)
    draw.rectangle((MARGIN, MARGIN, MARGIN + SIZE, MARGIN + SIZE), outline="black")
    reach = f"{landscape.alphas[0]:g} .. {landscape.alphas[-1]:g}"
    draw.text((MARGIN, MARGIN - 24), f"{title}  loss {low:.4g} .. {high:.4g}".strip(), fill="black")
    draw.text((MARGIN, MARGIN + SIZE + 8), f"filter-normalised distance {reach}", fill="black")
    return image


def save(landscape: Landscape, path: str | Path, title: str = "") -> Path:
    """Write the picture as PNG."""
    path = Path(path)
    picture(landscape, title).save(path)
    return path


def _flat(landscape: Landscape) -> list[float]:
    flat: list[float] = []
    for row in landscape.loss:
        flat.extend(row if isinstance(row, list) else [row])
    return flat


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high <= low else (value - low) / (high - low)


def _curve(draw: ImageDraw.ImageDraw, landscape: Landscape, low: float, high: float) -> None:
    first, last = landscape.alphas[0], landscape.alphas[-1]
    points = [
        (MARGIN + SIZE * _share(a, first, last), MARGIN + SIZE * (1 - _share(value, low, high)))
        for a, value in zip(landscape.alphas, _flat(landscape))
    ]
    draw.line(points, fill=STOPS[2], width=3)


def _paint(image: Image.Image, landscape: Landscape, low: float, high: float) -> None:
    count = len(landscape.alphas)
    cells = Image.new("RGB", (count, count))
    for k, value in enumerate(_flat(landscape)):
        cells.putpixel((k // count, count - 1 - k % count), _colour(_share(value, low, high)))
    image.paste(cells.resize((SIZE, SIZE), Image.Resampling.BICUBIC), (MARGIN, MARGIN))


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    i = min(int(place), len(STOPS) - 2)
    mixed = [round(a + (b - a) * (place - i)) for a, b in zip(STOPS[i], STOPS[i + 1])]
    return (mixed[0], mixed[1], mixed[2])
