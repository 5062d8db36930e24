"""Boxes: intersection over union, non-maximum suppression, and average precision as COCO counts it.

A box is (x0, y0, x1, y1). Coordinates are shares of the image's sides here: an intersection over union is the same in
pixels. Everything works on whole batches of images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's: 0.50, 0.55 .. 0.95
_RECALLS = 101  # points of recall that COCO's average precision is the mean over
TRUE, FALSE, NEITHER = 1.0, 0.0, -1.0


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def intersection(ours: Tensor, theirs: Tensor) -> Tensor:
    """Areas that boxes [..., N, 4] and [..., M, 4] share, [..., N, M]."""
    a, b = ours[..., :, None, :], theirs[..., None, :, :]
    return area(torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1))


def iou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of boxes [..., N, 4] and [..., M, 4], [..., N, M]; 0 for two boxes without area."""
    shared = intersection(ours, theirs)
    union = area(ours)[..., :, None] + area(theirs)[..., None, :] - shared
    return shared / union.clamp(min=1e-12)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, most: float) -> Tensor:
    """Greedy non-maximum suppression: which of [B, D] are kept, the scores falling along D.

    A box goes where one of its class with a higher score, itself kept, overlaps it by more than ``most``.
    """
    later = torch.ones(boxes.shape[1], boxes.shape[1], dtype=torch.bool, device=boxes.device).triu(1)
    near = (iou(boxes, boxes) > most) & (classes[:, :, None] == classes[:, None, :]) & later
    keep = scores > 0
    for i in range(boxes.shape[1]):
        keep = keep & ~(near[:, i] & keep[:, i : i + 1])
    return keep


def match(found: Tensor, truth: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> Tensor:
    """[B, D, T]: is a detection right (1), wrong (0), or neither (-1), at each overlap of ``thresholds``.

    found: [B, D, 6] class, box, score, the scores falling; score 0 is no detection. truth: [B, M, 6] class (-1: no
    box), box, ignore. As COCO does: the best detection first, each takes the box of its class that it overlaps most
    and that is still free; one that finds none but lies in an ignored region (by its own area) is neither.
    """
    near = iou(found[..., 1:5], truth[..., 1:5])
    inside = intersection(found[..., 1:5], truth[..., 1:5]) / area(found[..., 1:5])[..., None].clamp(min=1e-12)
    same = found[..., :1] == truth[..., 0][:, None]
    ignored = truth[..., 5] > 0.5
    near = torch.where(same & ~ignored[:, None], near, -1.0)
    inside = torch.where(same & ignored[:, None], inside, -1.0)
    wanted = torch.tensor(thresholds, dtype=near.dtype, device=near.device)
    free = torch.ones(len(found), len(thresholds), truth.shape[1], dtype=torch.bool, device=near.device)
    marks = torch.full((*found.shape[:2], len(thresholds)), NEITHER, dtype=near.dtype, device=near.device)
    for i in range(int((found[..., 5] > 0).sum(1).max()) if found.numel() else 0):
        overlap, which = torch.where(free, near[:, i : i + 1], -1.0).max(-1)
        hit = (overlap >= wanted) & (found[:, i, 5:] > 0)
        free = free & ~(hit[..., None] & torch.nn.functional.one_hot(which, truth.shape[1]).bool())
        excused = inside[:, i].amax(-1, keepdim=True) >= wanted
        marks[:, i] = torch.where(hit, TRUE, torch.where(excused, NEITHER, FALSE))
    return torch.where(found[..., 5:] > 0, marks, NEITHER)


def average_precision(scores: Tensor, right: Tensor, boxes: int) -> float:
    """COCO's average precision of one class: precision, made to fall with recall, mean over 101 recalls.

    scores, right: [N] of all images' detections of the class. boxes: how many there are to be found, above 0.
    """
    order = scores.argsort(descending=True, stable=True)
    hits = right[order].double().cumsum(0)
    recall, precision = hits / boxes, hits / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    precision = precision.flip(0).cummax(0).values.flip(0)
    at = torch.searchsorted(recall, torch.linspace(0, 1, _RECALLS, dtype=torch.float64))
    return float(torch.cat([precision, torch.zeros(1, dtype=torch.float64)])[at.clamp(max=len(hits))].mean())


def mean_average_precision(scores: Tensor, classes: Tensor, marks: Tensor, boxes: Tensor) -> float:
    """Mean over the classes that occur and over the overlaps. scores, classes: [N]; marks: [N, T]; boxes: [classes]."""
    found = []
    for label in (boxes > 0).nonzero().flatten().tolist():
        mine = (classes == label) & (scores > 0)
        for threshold in range(marks.shape[1]):
            counted = mine & (marks[:, threshold] != NEITHER)
            right = marks[counted, threshold] == TRUE
            found.append(average_precision(scores[counted], right, int(boxes[label])))
    return sum(found) / len(found) if found else math.nan
