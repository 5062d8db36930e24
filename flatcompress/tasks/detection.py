"""Boxes of classes, found by an anchor-free detector on one feature map (FCOS, arXiv 1904.01355).

Output [B, classes + 5, h, w]: of every cell the class logits p, the logarithms of the distances (l, t, r, b) from its
centre to the sides of a box, in cells, and the logit of centre-ness. Targets [B, M, 6]: class (-1: no box), x0, y0, x1,
y1 as shares of the image's sides, and 1 for a region that is ignored (a crowd).

A cell is responsible for the smallest box that its centre lies in, not further than 1.5 cells from the box's centre
("center sampling" of the paper's improvements); the cell nearest to a box's centre always is, so no box is too small
to be learned. With c* a cell's class, 0 for none (paper, eq. 1 to 3):

    l* = x - x0,  t* = y - y0,  r* = x1 - x,  b* = y1 - y                                        (1)
    L  = 1/N_pos sum L_cls(p, c*) + lambda/N_pos sum [c* > 0] L_reg(t, t*)  + centre-ness, below  (2)
    centerness* = sqrt(min(l*, r*) / max(l*, r*) * min(t*, b*) / max(t*, b*))                    (3)

L_cls is the focal loss (arXiv 1708.02002, alpha 0.25, gamma 2), L_reg is -ln IoU (arXiv 1608.01471), lambda is 1, and
centre-ness has binary cross-entropy. Decoding: score = p * centre-ness, then non-maximum suppression by class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from flatcompress.errors import UserError, unknown
from flatcompress.tasks import boxes as geometry
from flatcompress.tasks.metrics import Metric
from flatcompress.tasks.targets import box_lists
from flatcompress.tasks.task import Task

EXTRA = 5  # channels beside the classes: four distances and centre-ness
ALPHA, GAMMA = 0.25, 2.0
RADIUS = 1.5  # cells around a box's centre that are responsible for it
NEAREST = 0.05  # cells: a distance is never less, so its logarithm is finite
_LEFT = 0.25  # of a box must be left where augmentation cuts it off
_FAR = 7.0  # logarithm of the largest distance, in cells


def detection(
    score_threshold: float = 0.05, nms: float = 0.5, most: int = 100, select: str = "map", focal: float = GAMMA
) -> Task:
    """``score_threshold``, ``nms`` (overlap), ``most``: what decoding keeps of an image. ``select``: map or map_50.

    ``map`` is COCO's mean average precision over overlaps of 0.5 to 0.95, ``map_50`` that at 0.5. ``focal``: gamma.
    """
    if select not in ("map", "map_50"):
        raise unknown("metric of task detection", select, ("map", "map_50"))
    for key, value, top in (("score_threshold", score_threshold, 1), ("nms", nms, 1), ("focal", focal, 10)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
            raise UserError(f"task detection: {key} is a number from 0 to {top}, found {value!r}.")
    if type(most) is not int or not 1 <= most <= 1000:
        raise UserError(f"task detection: most is how many boxes an image may have, 1 to 1000, found {most!r}.")

    def decoded(output: Tensor) -> Tensor:
        return decode(output, score_threshold, nms, most)

    table = {"map": _precision(decoded, most, geometry.THRESHOLDS), "map_50": _precision(decoded, most, (0.5,))}
    usual: dict[str, Any] = {"score_threshold": 0.05, "nms": 0.5, "most": 100, "select": "map", "focal": GAMMA}
    given = {"score_threshold": score_threshold, "nms": nms, "most": most, "select": select, "focal": focal}
    return Task(
        lambda output, y: loss(output, y, focal),
        {name: table[name] for name in dict.fromkeys([select, *table])},
        "detection",
        box_lists,
        names=lambda y: tuple(str(c) for c in range(1 + int(y[..., 0].max()) if y.numel() else 0)),
        output=_map_of_boxes,
        fits=_of_images,
        occurring=lambda y: set(y[..., 0].unique().long().tolist()) - {-1},
        of_classes=True,
        ragged=True,
        moved=moved,
        drawn=lambda picture, output, y, names: drawn(picture, decoded(output[None])[0], y, names),
        decode={"boxes": {"format": "fcos", "score_threshold": score_threshold, "nms": nms, "most": most}},
        options={key: value for key, value in given.items() if value != usual[key]},
    )


def loss(output: Tensor, y: Tensor, gamma: float = GAMMA) -> Tensor:
    """Equation 2 of the paper and the centre-ness, a scalar: summed over cells, over the number of responsible ones."""
    output = output.float()
    label, distances, ignored = assign(y.to(output), output.shape[-2], output.shape[-1])
    classes = output.shape[1] - EXTRA
    chosen = label >= 0
    count = chosen.sum().clamp(min=1)
    logits = output[:, :classes].movedim(1, -1)
    wanted = F.one_hot(label.clamp(min=0), classes).to(output) * chosen[..., None]
    terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = torch.sigmoid(torch.where(wanted > 0.5, logits, -logits))
    weight = torch.where(wanted > 0.5, ALPHA, 1 - ALPHA) * (1 - right).clamp(min=1e-12) ** gamma
    total = (weight * terms)[~ignored].sum()
    found, theirs = distance(output).movedim(1, -1)[chosen], distances[chosen]
    total = total - _overlap(found, theirs).clamp(min=1e-6).log().sum()
    centred = F.binary_cross_entropy_with_logits(output[:, -1][chosen], centerness(theirs), reduction="sum")
    return (total + centred) / count


def distance(output: Tensor) -> Tensor:
    """Distances [B, 4, h, w] to the sides, in cells."""
    return output[:, -EXTRA:-1].clamp(max=_FAR).exp()


def centerness(distances: Tensor) -> Tensor:
    """Equation 3, [..., 4] -> [...]."""
    across, down = distances[..., 0::2], distances[..., 1::2]
    return (across.amin(-1) / across.amax(-1) * (down.amin(-1) / down.amax(-1))).sqrt()


def _overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """Intersection over union of two boxes around one point, given by their distances [..., 4]."""

    def size(d: Tensor) -> Tensor:
        return (d[..., 0] + d[..., 2]) * (d[..., 1] + d[..., 3])

    shared = size(torch.minimum(ours, theirs))
    return shared / (size(ours) + size(theirs) - shared)


def centres(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x [w] and y [h] of the cells' centres, as shares of the sides."""
    x, y = (torch.arange(n, device=like.device, dtype=like.dtype).add(0.5).div(n) for n in (width, height))
    return x, y


def assign(y: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every cell the class [B, h, w] (-1: none), the distances (1) in cells [B, h, w, 4], and whether it is ignored.

    A cell counts for nothing where it is responsible for no box and lies in an ignored region.
    """
    across, down = centres(height, width, y)
    grid_x, grid_y = across.view(1, 1, 1, -1), down.view(1, 1, -1, 1)
    x0, y0, x1, y1 = (y[..., i, None, None] for i in range(1, 5))
    shape = (*y.shape[:2], height, width)
    sides = [(grid_x - x0) * width, (grid_y - y0) * height, (x1 - grid_x) * width, (y1 - grid_y) * height]
    distances = torch.stack([side.expand(shape) for side in sides], -1)
    away_x, away_y = ((grid_x - (x0 + x1) / 2) * width).abs(), ((grid_y - (y0 + y1) / 2) * height).abs()
    inside = distances.amin(-1) > 0
    nearest = (away_x <= away_x.amin(-1, keepdim=True)) & (away_y <= away_y.amin(-2, keepdim=True))
    there, crowd = (y[..., 0] >= 0)[..., None, None], (y[..., 5] > 0.5)[..., None, None]
    mine = (inside & (torch.maximum(away_x, away_y) <= RADIUS) | nearest) & there & ~crowd
    size = torch.where(mine, geometry.area(y[..., 1:5])[..., None, None], torch.inf)
    least, which = size.min(1)
    label = torch.where(least.isfinite(), y[..., 0].long().gather(1, which.flatten(1)).view_as(which), -1)
    chosen = distances.gather(1, which[:, None, ..., None].expand(-1, 1, -1, -1, 4))[:, 0]
    ignored = (inside & there & crowd).any(1) & (label < 0)
    return label, chosen.clamp(min=NEAREST), ignored


def decode(output: Tensor, score_threshold: float = 0.05, nms: float = 0.5, most: int = 100) -> Tensor:
    """[B, D, 6], D at most ``most``: class, x0, y0, x1, y1 in 0..1, score; the best first, score 0 for none."""
    output = output.float()
    height, width = output.shape[-2:]
    classes = output.shape[1] - EXTRA
    scores = (output[:, :classes].sigmoid() * output[:, -1:].sigmoid()).flatten(1)
    best, which = scores.topk(min(most, scores.shape[1]), 1)
    cell = which % (height * width)
    x, y = (c.to(output) for c in centres(height, width, output))
    x, y = x[cell % width], y[cell // width]
    sides = distance(output).flatten(2).gather(2, cell[:, None].expand(-1, 4, -1))
    corners = [x - sides[:, 0] / width, y - sides[:, 1] / height, x + sides[:, 2] / width, y + sides[:, 3] / height]
    found = torch.stack(corners, -1).clamp(0, 1)
    best = torch.where(best > score_threshold, best, 0.0)
    label = which // (height * width)
    keep = geometry.suppress(found, best, label, nms)
    best = torch.where(keep, best, 0.0)
    order = best.argsort(dim=1, descending=True, stable=True)
    rows = torch.cat([label[..., None].to(found), found, best[..., None]], -1)
    return rows.gather(1, order[..., None].expand_as(rows))


def moved(y: Tensor, theta: Tensor) -> Tensor:
    """Boxes [B, M, 6] of images sampled at ``theta`` [B, 2, 3], cut off at the new sides.

    A box of which less than a quarter is left is ignored from then on, one of which nothing is left is none.
    """
    scale = torch.stack([theta[:, 0, 0], theta[:, 1, 1]] * 2, 1)[:, None]
    middle = torch.stack([theta[:, 0, 2], theta[:, 1, 2]] * 2, 1)[:, None]
    ends = ((2 * y[..., 1:5] - 1 - middle) / scale + 1) / 2
    corners = torch.cat([torch.minimum(ends[..., :2], ends[..., 2:]), torch.maximum(ends[..., :2], ends[..., 2:])], -1)
    inside = corners.clamp(0, 1)
    left = geometry.area(inside) / geometry.area(corners).clamp(min=1e-12)
    label = torch.where(left > 0, y[..., 0], -1.0)
    ignored = torch.where(left < _LEFT, 1.0, y[..., 5])
    return torch.cat([label[..., None], inside, ignored[..., None]], -1)


def _precision(decoded: Callable[[Tensor], Tensor], most: int, thresholds: tuple[float, ...]) -> Metric:
    """Mean average precision; a row: boxes of each class, then class, score and marks of ``most`` detections."""
    wide = most * (2 + len(thresholds))

    def rows(output: Tensor, y: Tensor) -> Tensor:
        found, truth = decoded(output).cpu(), y.float().cpu()
        classes = output.shape[1] - EXTRA
        marks = geometry.match(found, truth, thresholds)
        kept = torch.cat([found[..., :1], found[..., 5:], marks], -1).flatten(1)
        real = (truth[..., 0] >= 0) & (truth[..., 5] < 0.5) & (truth[..., 0] < classes)
        label = torch.where(real, truth[..., 0], classes).long()
        counts = F.one_hot(label, classes + 1).sum(1)[:, :-1]
        return torch.cat([counts, F.pad(kept, (0, wide - kept.shape[1]))], 1)

    def finish(found: Tensor) -> float:
        counts, rest = found[:, :-wide].sum(0), found[:, -wide:].reshape(-1, wide // most)
        return geometry.mean_average_precision(rest[:, 1], rest[:, 0], rest[:, 2:], counts)

    return Metric(rows, finish, share=True)


def _map_of_boxes(output: Tensor, y: Tensor, names: Sequence[str]) -> str | None:
    wanted = len(names) + EXTRA
    if output.ndim == 4 and output.shape[:2] == (len(y), wanted):
        return None
    return (
        f"the model gives {tuple(output.shape)} for {len(y)} images; wanted ({len(y)}, {wanted}, h, w): of every cell "
        f"{len(names)} class logits, four log distances, and the logit of centre-ness."
    )


def _of_images(inputs: tuple[int, ...], targets: tuple[int, ...]) -> str | None:
    return None if len(inputs) == 3 else f"boxes belong to images [C, H, W]; the inputs are {inputs}."


def drawn(picture: Image.Image, found: Tensor, y: Tensor, names: Sequence[str]) -> Image.Image:
    """The picture with the true boxes dotted in white, and the found ones [D, 6] with class and score in colour."""
    canvas = ImageDraw.Draw(picture)
    width, height = picture.size

    def placed(box: Sequence[float]) -> list[float]:
        x0, y0, x1, y1 = (v * side for v, side in zip(box, (width - 1, height - 1) * 2))
        return [x0, y0, x1, y1]

    for row in y[y[:, 0] >= 0].tolist():
        canvas.rectangle(placed(row[1:5]), outline="white" if row[5] < 0.5 else "grey")
    for label, *box, score in found[found[:, 5] >= 0.3].flip(0).tolist():
        colour = f"hsl({int(label) * 137 % 360}, 90%, 55%)"
        canvas.rectangle(placed(box), outline=colour, width=2)
        name = names[int(label)] if int(label) < len(names) else str(int(label))
        text = f"{name[:16]} {score:.2f}".encode("latin-1", "replace").decode("latin-1")
        canvas.text((placed(box)[0] + 3, placed(box)[1] + 1), text, fill=colour)
    return picture
