"""ImageNet-C, ImageNet-V2 and CIFAR-10-C: labelled by the training classes, every error names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatcompress import data
from flatcompress.data.images import published_tests
from flatcompress.errors import UserError

CLASSES = ("n01", "n02", "n03")


def fill(folder: Path, classes: tuple[str, ...], n: int, level: int = 0) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (80 * label + i, level, 0)).save(folder / name / f"{i}.png")
    return folder


def load(tmp_path: Path, **options):
    if not (tmp_path / "train").exists():
        fill(tmp_path / "train", CLASSES, 10)
    return data.load("folder", path=str(tmp_path / "train"), size=8, **options)


def test_corrupted_folders_replace_computed_corruptions_and_keep_the_class_order(tmp_path):
    root = tmp_path / "c"
    for severity in (1, 5):
        fill(root / "fog" / str(severity), ("n02", "n03"), 3, level=severity)  # a class may be missing
    bundle = load(tmp_path, corrupted_path=str(root), corrupted_limit=2)
    assert set(bundle.corrupted) == {"fog/1", "fog/5"}
    hardest = bundle.corrupted["fog/5"]
    assert hardest.labels.tolist() == [1, 1, 2, 2]
    assert (hardest.pixels([0, 3])[:, 1] == 5).all()
    x, _ = hardest.__getitems__([0])
    assert x.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("names", [CLASSES, ("0", "1", "2")])
def test_held_out_folder_is_only_measured_on(names, tmp_path):
    root = fill(tmp_path / "imagenetv2", names, 4)
    bundle = load(tmp_path, held_out_path=str(root), corruptions="none")
    assert bundle.held_out_domain == "imagenetv2"
    assert bundle.held_out.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(bundle.train) + len(bundle.val) + len(bundle.test) == 30
    assert set(bundle.held_out.domain_ids.tolist()) == {1} and set(bundle.train.domain_ids.tolist()) == {0}


def broken_folder(tmp_path: Path, kind: str) -> dict[str, str]:
    root = tmp_path / "c"
    if kind == "severity":
        fill(root / "fog" / "mild", CLASSES, 1)
    elif kind == "class":
        fill(root / "fog" / "1", ("n01", "n99"), 1)
    elif kind == "empty":
        (root / "fog" / "1" / "n01").mkdir(parents=True)
    elif kind == "nothing":
        root.mkdir()
    elif kind == "held out class":
        return {"held_out_path": str(fill(tmp_path / "v2", ("dog", "n01"), 1))}
    return {"corrupted_path": str(root)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("severity", "1 to 5"),
        ("class", "n99"),
        ("empty", "no image"),
        ("nothing", "no corruption"),
        ("missing", "does not exist"),
        ("held out class", "dog"),
    ],
)
def test_a_published_folder_that_does_not_fit_is_named(kind, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **broken_folder(tmp_path, kind))


def cifar(root: Path) -> Path:
    root.mkdir()
    records = np.zeros((60, 3073), np.uint8)
    records[:, 0] = np.arange(60) % 10
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (root / name).write_bytes(records.tobytes())
    return root


def test_cifar_10_c_arrays_become_corruptions_by_severity(tmp_path):
    root = tmp_path / "c"
    root.mkdir()
    labels = np.tile(np.arange(4, dtype=np.uint8), 5)
    pixels = np.repeat(np.arange(5, dtype=np.uint8), 4)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)
    pixels[..., 2] = 200  # the last axis is the channel
    np.save(root / "labels.npy", labels)
    np.save(root / "fog.npy", pixels)
    bundle = data.load("cifar10", path=str(cifar(tmp_path / "cifar")), corrupted_path=str(root))
    assert sorted(bundle.corrupted) == [f"fog/{s}" for s in range(1, 6)]
    part = bundle.corrupted["fog/3"]
    assert part.labels.tolist() == [0, 1, 2, 3]
    assert published_tests.cifar_c(str(root), 3)["fog/3"].labels.tolist() == [0, 1, 2]
    assert (part.pixels([0])[0, 0] == 2).all() and (part.pixels([0])[0, 2] == 200).all()


@pytest.mark.parametrize(
    ("labels", "pixels", "message"),
    [
        (np.arange(10), np.zeros((9, 32, 32, 3), np.uint8), "expected uint8"),
        (np.arange(10), np.zeros((10, 32, 32, 3), np.float32), "expected uint8"),
        (np.arange(9), np.zeros((9, 32, 32, 3), np.uint8), "5 x N"),
        (np.full(10, 11), np.zeros((10, 32, 32, 3), np.uint8), "0 to 9"),
        (np.arange(10), np.array([{"run": "me"}]), "not a plain array"),
        (None, np.zeros((10, 32, 32, 3), np.uint8), "labels.npy"),
    ],
)
def test_broken_cifar_10_c_files_are_named(labels, pixels, message, tmp_path):
    root = tmp_path / "c"
    root.mkdir()
    if labels is not None:
        np.save(root / "labels.npy", labels)
    np.save(root / "fog.npy", pixels, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        data.load("cifar10", path=str(cifar(tmp_path / "cifar")), corrupted_path=str(root))
