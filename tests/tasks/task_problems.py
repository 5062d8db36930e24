"""A small problem of every task: inputs, targets, a network for them, and what a perfect output is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.tasks import detection

N = 96
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(N, 3, 8, 8, generator=GENERATOR)
SERIES = torch.randn(N, 2, 16, generator=GENERATOR)


def images(outputs: int, maps: bool = False) -> nn.Module:
    """Two convolutions, and a vector or a map at the end."""
    torch.manual_seed(0)
    end = [nn.Conv2d(8, outputs, 1)] if maps else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)]
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    body += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, *end)


def series(outputs: int) -> nn.Module:
    """Classes for every step."""
    torch.manual_seed(0)
    body = [nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, outputs, 1))


def detector(classes: int) -> nn.Module:
    """A map of a quarter of the sides."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        *body, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes + 5, 1)
    )


def box_map(y: Tensor, classes: int, side: int = 12) -> Tensor:
    """The output of a detector that has found every box."""
    label, distances, _ = detection.assign(y, side, side)
    hot = nn.functional.one_hot(label + 1, classes + 1)[..., 1:].float()
    centred = torch.logit(detection.centerness(distances).clamp(1e-3, 1 - 1e-3))[..., None] + 2
    return torch.cat([30 * hot - 15, distances.log(), centred], -1).movedim(-1, 1)


def logits(classes: Tensor, count: int, axis: int) -> Tensor:
    """Sure of the given classes."""
    return 20.0 * nn.functional.one_hot(classes, count).float().movedim(-1, axis)


@dataclass(frozen=True)
class Problem:
    """``perfect``: an output for the whole set that gets everything right; ``wrong``: one that is refused."""

    net: Any
    x: Tensor
    y: Tensor
    perfect: Tensor
    wrong: Tensor
    best: float = 1.0


_classes = (IMAGES[:, 0].mean((1, 2)) > 0.5).long()
_numbers = torch.stack([IMAGES[:, 0].mean((1, 2)), IMAGES[:, 1].amax((1, 2))], 1)
_labels = (IMAGES.mean((2, 3)) > 0.5).float()
_masks = (IMAGES[:, 0] > 0.5).long() + (IMAGES[:, 1] > 0.8).long()
_corners = torch.rand(N, 2, 2, generator=GENERATOR) * torch.tensor([0.1, 0.4])  # two boxes an image, side by side
_corners = _corners + torch.tensor([[0.02, 0.05], [0.5, 0.05]])
_boxes = torch.cat([(torch.arange(2 * N) % 3 % 2).view(N, 2, 1), _corners, _corners + torch.tensor([0.37, 0.5])], 2)
_padded = torch.cat([_boxes, torch.zeros(N, 2, 1)], 2)
_steps = (SERIES[:, 0] > 0).long()

PROBLEMS = {
    "classification": Problem(lambda: images(2), IMAGES, _classes, logits(_classes, 2, -1), torch.zeros(N, 3)),
    "regression": Problem(lambda: images(2), IMAGES, _numbers, _numbers.clone(), torch.zeros(N, 1), 0.0),
    "multilabel": Problem(lambda: images(3), IMAGES, _labels, 40 * _labels - 20, torch.zeros(N, 2)),
    "segmentation": Problem(lambda: images(3, True), IMAGES, _masks, logits(_masks, 3, 1), torch.zeros(N, 3, 4, 4)),
    "sequence": Problem(lambda: series(2), SERIES, _steps, logits(_steps, 2, 1), torch.zeros(N, 16, 2)),
    "detection": Problem(lambda: detector(2), IMAGES, _boxes, box_map(_padded, 2), torch.zeros(N, 6, 4, 4)),
    "reconstruction": Problem(
        lambda: images(3, True), IMAGES, torch.zeros(N, dtype=torch.long), IMAGES.clone(), torch.zeros(N, 3, 4, 8), 0.0
    ),
}
