"""Images with boxes in COCO's and in YOLO's files: what is read is what was written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress import data

WIDE, HIGH, COUNT = 20, 10, 24
NAMES = ["cat", "dog"]


def box(i: int) -> list[float]:
    """x, y, width, height in pixels: each image's own."""
    return [float(i % 8), float(i % 4), 4.0 + i % 5, 3.0 + i % 3]


def picture(path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((HIGH, WIDE), 10 * i, np.uint8)).save(path)


def coco(root, numbers=range(COUNT), folder: str = "", name: str = "boxes.json") -> dict:
    """Images with a box each (every sixth has none), the class by the number."""
    sides = {"width": WIDE, "height": HIGH}
    images = [{"id": 100 + i, "file_name": f"{folder}{i}.png", "site": f"s{i % 3}", **sides} for i in numbers]
    boxes = [
        {"id": i, "image_id": 100 + i, "category_id": 7 + 2 * (i % 2), "bbox": box(i), "iscrowd": int(i % 12 == 3)}
        for i in numbers
        if i % 6
    ]  # fmt: skip
    categories = [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}]
    for i in numbers:
        picture(root / "images" / f"{folder}{i}.png", i)
    found = {"images": images, "annotations": boxes, "categories": categories}
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(found))
    return found


def yolo(root, numbers=range(COUNT), images: str = "images", labels: str = "labels") -> None:
    for i in numbers:
        picture(root / images / f"{i}.png", i)
        if i % 6:
            x, y, w, h = box(i)
            row = f"{i % 2} {(x + w / 2) / WIDE} {(y + h / 2) / HIGH} {w / WIDE} {h / HIGH}\n"
            (root / labels).mkdir(parents=True, exist_ok=True)
            (root / labels / f"{i}.txt").write_text(row)
    (root / "data.yaml").write_text("names: {0: cat, 1: dog}\n")


def load(name, root, **options):
    return data.load(name, path=str(root), size=8, channels=1, corruptions="none", **options)


def check(found, crowds: bool = False) -> None:
    """Every image has its own box, class and crowd flag."""
    for part in (found.train, found.val, found.test, *([found.held_out] if found.held_out else [])):
        for i in range(len(part)):
            number = round(int(part.pixels([i])[0, 0, 0, 0]) / 10)
            rows = part.targets[i][part.targets[i][:, 0] >= 0]
            assert len(rows) == (1 if number % 6 else 0)
            if len(rows):
                x, y, w, h = box(number)
                wanted = [number % 2, x / WIDE, y / HIGH, (x + w) / WIDE, (y + h) / HIGH, crowds and number % 12 == 3]
                torch.testing.assert_close(rows[0], torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.filterwarnings("ignore:.*have no box")
def test_a_box_is_that_of_its_image_whichever_file_it_came_from(tmp_path):
    coco(tmp_path / "coco")
    yolo(tmp_path / "yolo")
    for name in ("coco", "yolo"):
        found = load(name, tmp_path / name)
        check(found, crowds=name == "coco")
        assert found.classes == tuple(NAMES) and found.task.name == "detection"
        assert len(found.train) + len(found.val) + len(found.test) == COUNT
        assert any("4 of 24 images have no box" in note for note in found.notes)
        x, y = found.train.__getitems__([0, 1])
        assert x.shape == (2, 1, 8, 8) and y.shape[2] == 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["instances", "images/part", "part/images", "mapping"])
def test_parts_are_those_of_the_owner(layout, tmp_path):
    parts = {"train": range(12), "valid": range(12, 18), "test": range(18, 24)}
    options = {}
    for part, numbers in parts.items():
        if layout == "images/part":
            yolo(tmp_path, numbers, f"images/{part}", f"labels/{part}")
        elif layout == "part/images":
            yolo(tmp_path, numbers, f"{part}/images", f"{part}/labels")
        else:
            coco(tmp_path, numbers, name=f"annotations/instances_{part}2017.json")
            options = {"annotations": {p: f"instances_{p}2017.json" for p in parts}} if layout == "mapping" else {}
    found = load("yolo" if "images" in layout else "coco", tmp_path, **options)
    check(found, crowds="images" not in layout)
    assert [len(found.train), len(found.val), len(found.test)] == [12, 6, 6]


@pytest.mark.filterwarnings("ignore")
def test_a_domain_is_a_key_of_the_images_or_a_folder_and_is_never_trained_on(tmp_path):
    coco(tmp_path / "coco")
    found = load("coco", tmp_path / "coco", domain="site", held_out="s1")
    check(found, crowds=True)
    assert found.domains == ("s0", "s1", "s2") and len(found.held_out) == 8
    for start, place in ((0, "day"), (12, "night")):
        yolo(tmp_path / "yolo", range(start, start + 12), f"{place}/images", f"{place}/labels")
    found = load("yolo", tmp_path / "yolo", held_out="night")
    check(found)
    assert found.held_out_domain == "night" and len(found.held_out) == 12
    raw = coco(tmp_path / "folders", folder="day/")
    for row in raw["images"][12:]:
        row["file_name"] = "dusk/" + row["file_name"].removeprefix("day/")
        picture(tmp_path / "folders" / "images" / row["file_name"], row["id"] - 100)
    (tmp_path / "folders" / "boxes.json").write_text(json.dumps(raw))
    assert len(load("coco", tmp_path / "folders", domain="folder", held_out="dusk").held_out) == 12


@pytest.mark.filterwarnings("ignore:.*have no box")
def test_categories_that_are_not_learned_are_left_out_and_counted(tmp_path):
    coco(tmp_path)
    with pytest.warns(UserWarning, match=r"left out \(dog 12\)"):
        found = load("coco", tmp_path, classes=["cat"])
    assert found.classes == ("cat",) and set(found.train.targets[..., 0].unique().tolist()) == {-1, 0}


@pytest.mark.filterwarnings("ignore:.*have no box")
def test_augmentation_moves_the_boxes_and_a_crowd_stays_one(tmp_path):
    coco(tmp_path)
    plain = load("coco", tmp_path).train
    flipped = load("coco", tmp_path, augment={"flip": 1.0}).train
    rows = list(range(len(plain)))
    (_, y), (_, z) = plain.__getitems__(rows), flipped.__getitems__(rows)
    real = y[..., 0] >= 0
    torch.testing.assert_close(z[real][:, 1], 1 - y[real][:, 3])
    torch.testing.assert_close(z[real][:, [0, 2, 4, 5]], y[real][:, [0, 2, 4, 5]])


def test_stand_ins_are_boxes_around_what_is_drawn():
    options = {"train_count": 16, "val_count": 8, "test_count": 8, "corruptions": "none"}
    found = data.load("drawn-objects", **options)
    again = data.load("drawn-objects", **options)
    assert torch.equal(found.train.targets, again.train.targets) and len(found.held_out) == 8
    assert torch.equal(found.train[3][0], again.train[3][0])
    pixels = found.train.pixels(list(range(16))).float().amax(1)
    ground = pixels.median()
    for picture_, boxes in zip(pixels, found.train.targets):
        for row in boxes[boxes[:, 0] >= 0]:
            x0, y0, x1, y1 = (row[1:5] * 48).round().int().tolist()
            assert picture_[y0:y1, x0:x1].mean() > ground


def test_a_coco_file_that_is_moved_elsewhere_still_finds_its_images(tmp_path):
    coco(tmp_path / "data")
    shutil.move(tmp_path / "data" / "boxes.json", tmp_path / "elsewhere.json")
    with pytest.warns(UserWarning, match="have no box"):
        check(load("coco", tmp_path / "data", annotations=str(tmp_path / "elsewhere.json")), crowds=True)
