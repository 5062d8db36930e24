"""Detection: boxes, their matching and average precision, decoding, and what augmentation does to them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from task_problems import PROBLEMS, box_map

from flatcompress.data.augment import parse
from flatcompress.tasks import boxes, build, detection

KIT = Path(__file__).parents[2] / "export" / "runner.py"


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = 0.6 * torch.rand(*shape, 2, generator=g)
    return torch.cat([corner, corner + 0.1 + 0.3 * torch.rand(*shape, 2, generator=g)], -1)


def truth(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[row if len(row) == 6 else [*row, 0.0] for row in rows]])


def test_overlap_is_that_of_counted_pixels():
    a, b = (random_boxes(3, 4, seed=s).mul(100).round() for s in (0, 1))

    def pixels(box):
        filled = torch.zeros(110, 110, dtype=torch.bool)
        x0, y0, x1, y1 = box.int().tolist()
        filled[y0:y1, x0:x1] = True
        return filled

    found = boxes.iou(a, b)
    for i in range(3):
        for j in range(4):
            for k in range(4):
                one, two = pixels(a[i, j]), pixels(b[i, k])
                assert float(found[i, j, k]) == pytest.approx(float((one & two).sum() / (one | two).sum()), abs=1e-6)


def test_suppression_keeps_the_best_of_each_heap_and_nothing_that_overlaps_it():
    found = random_boxes(2, 30)
    scores = torch.linspace(0.9, 0.1, 30).expand(2, 30)
    classes = torch.arange(30).expand(2, 30) % 2
    keep = boxes.suppress(found, scores, classes, 0.3)
    for b in range(2):
        kept: list[int] = []
        for i in range(30):
            if all(
                classes[b, i] != classes[b, j] or boxes.iou(found[b, i : i + 1], found[b, j : j + 1]) <= 0.3
                for j in kept
            ):
                kept.append(i)
        assert keep[b].nonzero().flatten().tolist() == kept and 2 < len(kept) < 30


def slow_precision(detections, truths, threshold: float, label: int) -> float:
    """Average precision with nothing but loops. detections: per image rows class, box, score."""
    every = [(-row[5], i, row) for i, image in enumerate(detections) for row in image.tolist()]
    rows = sorted((score, i, row[1:5]) for score, i, row in every if row[0] == label and score < 0)
    free = [[row[1:5] for row in image.tolist() if row[0] == label] for image in truths]
    total, hits, points = sum(map(len, free)), 0, []
    for n, (_, i, box) in enumerate(rows, 1):
        overlaps = [area(box, other) / (area(box, box) + area(other, other) - area(box, other)) for other in free[i]]
        if overlaps and max(overlaps) >= threshold:
            free[i].pop(overlaps.index(max(overlaps)))
            hits += 1
        points.append((hits / total, hits / n))
    return sum(max([p for r, p in points if r >= k / 100], default=0.0) for k in range(101)) / 101


def area(a: list[float], b: list[float]) -> float:
    """What two boxes share; a box shares itself with itself."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@pytest.mark.parametrize("seed", range(3))
def test_mean_average_precision_is_that_of_plain_loops(seed):
    g = torch.Generator().manual_seed(seed)
    real = torch.cat(
        [torch.randint(-1, 2, (6, 4, 1), generator=g).float(), random_boxes(6, 4, seed=seed), torch.zeros(6, 4, 1)], 2
    )
    near = real[:, :, 1:5].repeat(1, 3, 1) + 0.06 * torch.randn(6, 12, 4, generator=g)
    scores = torch.rand(6, 12, 1, generator=g).sort(1, descending=True).values
    found = torch.cat([torch.randint(0, 2, (6, 12, 1), generator=g).float(), near, scores], 2)
    marks = boxes.match(found, real)
    counts = torch.tensor([int((real[..., 0] == c).sum()) for c in (0, 1)])
    value = boxes.mean_average_precision(found[..., 5].flatten(), found[..., 0].flatten(), marks.flatten(0, 1), counts)
    slow = [slow_precision(found, real, t, c) for c in (0, 1) for t in boxes.THRESHOLDS]
    assert value == pytest.approx(sum(slow) / len(slow), abs=1e-9) and value > 0.02


def test_a_detection_in_an_ignored_region_is_neither_right_nor_wrong():
    real = truth([0, 0.1, 0.1, 0.3, 0.3], [0, 0.5, 0.5, 1.0, 1.0, 1.0])
    rows = [
        [0, 0.1, 0.1, 0.3, 0.3, 0.9],
        [0, 0.6, 0.6, 0.7, 0.7, 0.8],
        [0, 0.1, 0.6, 0.2, 0.7, 0.7],
        [0, 0.1, 0.1, 0.3, 0.3, 0.6],
    ]
    marks = boxes.match(torch.tensor([rows]), real, (0.5,))
    assert marks.flatten().tolist() == [boxes.TRUE, boxes.NEITHER, boxes.FALSE, boxes.FALSE]


def test_the_smallest_box_gets_a_cell_and_a_box_between_the_cells_still_has_one():
    y = truth([0, 0.0, 0.0, 1.0, 1.0], [1, 0.3, 0.3, 0.45, 0.45], [2, 0.74, 0.74, 0.76, 0.76])
    label, distances, _ = detection.assign(y, 4, 4)
    assert set(label.unique().tolist()) == {0, 1, 2} and int(label[0, 1, 1]) == 1
    assert float(distances.min()) >= detection.NEAREST
    assert bool((detection.centerness(distances) <= 1).all())


def test_what_lies_in_an_ignored_region_teaches_nothing():
    y = truth([0, 0.0, 0.0, 0.5, 0.5], [1, 0.5, 0.5, 1.0, 1.0, 1.0])
    output = torch.zeros(1, 7, 8, 8, requires_grad=True)
    detection.loss(output, y).backward()
    assert not output.grad[0, :, 4:, 4:].any() and output.grad[0, :, :4, :4].any() and output.grad[0, :2, 4:, :4].any()


def test_an_image_without_boxes_has_a_finite_loss_and_no_metric():
    task = build("detection")
    y = task.targets([[], []], "train")
    output = torch.zeros(2, 7, 4, 4, requires_grad=True)
    task.loss(output, y).backward()
    assert output.grad.isfinite().all() and output.grad.any()
    assert np.isnan(task.measure([(output, y)])["map"])


def test_decoding_gives_back_the_boxes_that_were_encoded():
    y = build("detection").targets(PROBLEMS["detection"].y, "train")
    found = detection.decode(box_map(y, 2))
    kept = (found[..., 5] > 0.3).sum(1)
    assert bool((kept == 2).all())
    for real, rows in zip(y, found):
        for row in real:
            same = rows[:2][rows[:2, 0] == row[0]]
            assert float(boxes.iou(row[None, 1:5], same[:, 1:5]).max()) > 0.999


def test_the_device_runner_decodes_what_the_metric_decodes():
    spec = importlib.util.spec_from_file_location("device_runner", KIT)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    g = torch.Generator().manual_seed(0)
    output = torch.randn(20, 8, 6, 5, generator=g)
    ours = detection.decode(output, 0.2, 0.4, 40)
    for image, rows in zip(output, ours):
        theirs = runner.decode(image.numpy(), 0.2, 0.4, 40)
        np.testing.assert_allclose(theirs, rows[rows[:, 5] > 0].numpy(), atol=1e-5)
    assert bool((ours[..., 5] > 0).any())


@pytest.mark.parametrize("settings", [{"flip": 1.0}, {"crop": 0.5}, {"shift": 0.2, "flip": 0.5}])
def test_boxes_move_with_their_pixels(settings):
    n, side = 16, 40
    y = torch.cat([torch.zeros(n, 1, 1), random_boxes(n, 1), torch.zeros(n, 1, 1)], 2)
    axis = (torch.arange(side) + 0.5) / side
    x0, y0, x1, y1 = (y[:, 0, i].view(-1, 1, 1) for i in range(1, 5))
    filled = (axis > x0) & (axis < x1) & (axis[:, None] > y0) & (axis[:, None] < y1)
    augment, rows = parse(settings, 3), torch.arange(n)
    pictures = augment(filled[:, None].float(), rows, n, 1)[:, 0] > 0.5
    moved = detection.moved(y, augment.theta(rows, n, 1, (side, side)))
    for picture, (label, *box, ignored) in zip(pictures, moved[:, 0].tolist()):
        if label < 0 or ignored:
            continue
        down, across = picture.any(1).nonzero().flatten(), picture.any(0).nonzero().flatten()
        seen = [int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1]
        assert np.allclose(np.array(seen) / side, box, atol=2.5 / side)
    assert int((moved[..., 0] >= 0).sum()) > n // 2


def test_a_box_that_is_nearly_cut_away_is_ignored_and_one_that_is_gone_is_none():
    theta = torch.tensor([[[0.5, 0, -0.5], [0, 0.5, -0.5]]])  # the left upper quarter
    y = truth([0, 0.1, 0.1, 0.4, 0.4], [1, 0.45, 0.1, 0.9, 0.4], [2, 0.6, 0.6, 0.9, 0.9])
    moved = detection.moved(y, theta)[0]
    assert moved[:, 0].tolist() == [0, 1, -1] and moved[:2, 5].tolist() == [0, 1]
    assert torch.allclose(moved[0, 1:5], torch.tensor([0.2, 0.2, 0.8, 0.8]))


def test_an_example_shows_true_and_found_boxes_and_masks_lie_side_by_side():
    task, picture = build("detection"), Image.new("RGB", (96, 96))
    y = task.targets(PROBLEMS["detection"].y, "train")
    found = task.drawn(picture, box_map(y, 2)[0], y[0], ("a", "b"))
    assert found.size == (96, 96) and len(found.getcolors(9999)) > 2
    masks = build({"name": "segmentation", "ignore_index": 9})
    mask = torch.tensor([[0, 1], [1, 9]])
    wide = masks.drawn(Image.new("RGB", (8, 8)), torch.nn.functional.one_hot(mask % 2, 2).movedim(-1, 0), mask, ())
    assert wide.size == (28, 8) and wide.getpixel((10, 0)) != wide.getpixel((14, 0))
