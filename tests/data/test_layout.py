"""Folders as people have them: parts by their usual names, one class however it is typed, and nothing guessed."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress import data
from flatcompress.data import preview
from flatcompress.errors import UserError


def fill(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 4) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (6, 6), (20 * i, 40, 90)).save(folder / name / f"{i}.png")
    return folder


def load(path: Path, **keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.load("folder", path=str(path), size=4, corruptions="none", **keys)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"), ("training", "validation", "testing"), ("Train", "Valid", "Test"),
        ("TRAINING", "VALIDATION", "TEST"),
    ],
)  # fmt: skip
def test_the_usual_names_of_parts_are_understood_in_any_case(train: str, val: str, test: str, tmp_path):
    for name, n in ((train, 5), (val, 3), (test, 4)):
        fill(tmp_path / name, n=n)
    bundle = load(tmp_path)
    assert bundle.classes == ("cat", "dog")
    assert [len(part) for part in (bundle.train, bundle.val, bundle.test)] == [10, 6, 8]


@pytest.mark.parametrize("other", ["valid", "Validation", "test", "TESTING"])
def test_a_part_beside_training_alone_is_the_test_part(other: str, tmp_path):
    fill(tmp_path / "Training", n=5)
    fill(tmp_path / other, n=3)
    bundle = load(tmp_path)
    assert bundle.classes == ("cat", "dog")
    assert len(bundle.test) == 6 and len(bundle.train) + len(bundle.val) == 10


def _parts(*names: str):
    return lambda root: [fill(root / name) for name in names]


def _train_without_classes(root: Path) -> None:
    for name in ("train", "test"):
        fill(root, (name,))


UNCLEAR = {
    "two training parts": (_parts("train", "Training", "test"), "are both the train part"),
    "two validation parts": (_parts("train", "val", "valid"), "are both the val part"),
    "no training part": (_parts("val", "test"), "no training part beside it"),
    "training alone": (_parts("train"), "no val or test part beside it"),
    "parts without classes": (_train_without_classes, "hold images and no class folders"),
    "parts by other names": (_parts("training_set", "test_set"), "each hold the folders cat, dog"),
    "folds": (_parts("fold1", "fold2", "fold3"), "each hold the folders cat, dog"),
    "domains": (_parts("art", "photo"), "use data.name domains"),
    "classes differ": (lambda r: (fill(r / "train"), fill(r / "val", ("cat", "cow"))), "differ in cow, dog"),
    "classes differ by case": (lambda r: (fill(r / "train"), fill(r / "val", ("Cat", "dog"))), "capital letters"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_layout_that_could_be_read_in_two_ways_is_refused_with_the_reason(case: str, tmp_path):
    make, reason = UNCLEAR[case]
    make(tmp_path)
    with pytest.raises(UserError, match=reason):
        load(tmp_path)


def test_classes_may_be_called_like_parts_when_they_hold_images(tmp_path):
    assert load(fill(tmp_path, ("bus", "plane", "train"))).classes == ("bus", "plane", "train")


def test_a_class_may_keep_its_images_in_folders(tmp_path):
    fill(tmp_path / "cat", ("march", "may"))
    fill(tmp_path / "dog", ("june", "july"))
    bundle = load(tmp_path)
    assert bundle.classes == ("cat", "dog")
    assert len(bundle.train) + len(bundle.val) + len(bundle.test) == 16


def test_both_unicode_forms_of_a_name_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", (composed, "Tea"))
    fill(tmp_path / "test", (apart, "Tea"))
    assert load(tmp_path).classes == (composed, "Tea")
    both = fill(tmp_path / "both", (composed, apart, "Tea"))
    bundle = load(both)
    assert bundle.classes == (composed, "Tea")
    parts = (bundle.train, bundle.val, bundle.test)
    assert sum(int((p.labels == 0).sum()) for p in parts) == 8


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "tga", "pcx", "ico", "JPEG", "webp", "ppm", "pnm"])
def test_every_suffix_that_pillow_reads_is_read(suffix: str, tmp_path):
    fill(tmp_path)
    forms = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "ppm": "PPM", "pnm": "PPM"}
    form = forms.get(suffix, suffix.upper())
    Image.new("RGB", (16, 16), "red").save(tmp_path / "cat" / f"odd.{suffix}", format=form)
    bundle = load(tmp_path)
    assert sum(map(len, (bundle.train, bundle.val, bundle.test))) == 9
    assert bundle.notes == ()


def test_what_is_left_out_is_counted_and_named(tmp_path):
    fill(tmp_path)
    for name in ("a.txt", "b.txt", "c.heic", "plain"):
        (tmp_path / "cat" / name).write_text("x")
    (tmp_path / "cat" / ".hidden").write_text("x")
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match=r"4 files are no images .*\.txt 2") as seen:
        bundle = data.load("folder", path=str(tmp_path), size=4, corruptions="none")
    said = " ".join(str(w.message) for w in seen)
    assert ".heic 1" in said and "no suffix 1" in said and "1 images lie beside the class folders" in said
    assert len(bundle.notes) == 2


def test_a_folder_beside_the_parts_is_named(tmp_path):
    for name in ("train", "test", "unlabeled"):
        fill(tmp_path / name)
    assert "'unlabeled'" in load(tmp_path).notes[0]


# ------------------------------------------------------------------------------------------- more than eight bits


def deep(folder: Path, kind: str, values: list[float]) -> Path:
    """Two classes of images that are one grey value each."""
    types = {"png": np.uint16, "tif": np.float32, "tiff": np.int32}
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i, value in enumerate(values):
            array = np.full((4, 4), value, types[kind])
            Image.fromarray(array).save(folder / name / f"{i}.{kind}")
    return folder


def seen(bundle) -> list[float]:
    x = torch.cat([part.__getitems__(list(range(len(part))))[0] for part in (bundle.train, bundle.val, bundle.test)])
    return sorted({round(v, 5) for v in x[:, 0, 0, 0].tolist()})


@pytest.mark.parametrize("kind", ["png", "tif", "tiff"])
def test_one_range_of_intensity_serves_the_whole_set_and_is_stated(kind: str, tmp_path):
    bundle = load(deep(tmp_path, kind, [0, 1, 100, 4000]), mean=[0.0] * 3, std=[1.0] * 3)
    assert bundle.intensity == (0.0, 4000.0)
    assert seen(bundle) == [0.0, 0.00025, 0.025, 1.0]  # 1 of 4000 is less than a step of eight bits
    assert "8 of 8 images" in bundle.notes[0] and "0 to 4000 becomes 0 to 1" in bundle.notes[0]


def test_values_below_zero_move_the_start_of_the_range_and_a_given_range_clips(tmp_path):
    root = deep(tmp_path, "tif", [-1.0, 0.0, 1.0, 3.0])
    keys = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert load(root, **keys).intensity == (-1.0, 3.0)
    assert seen(load(root, intensity=[0, 2], **keys)) == [0.0, 0.5, 1.0]
    for wrong in ([2, 0], [1], "0-1", [0, float("nan")]):
        with pytest.raises(UserError, match="intensity"):
            load(root, intensity=wrong)


def test_a_set_of_eight_bits_has_no_range_and_the_same_bits_as_before(tmp_path):
    bundle = load(fill(tmp_path))
    assert bundle.intensity is None
    assert bundle.train.part.pixels.images.dtype == torch.uint8


def test_deep_and_plain_images_together_are_said(tmp_path):
    deep(tmp_path, "png", [0, 500])
    for name in ("cat", "dog"):
        Image.new("L", (4, 4), 255).save(tmp_path / name / "plain.png")
    bundle = load(tmp_path, mean=[0.0] * 3, std=[1.0] * 3)
    assert seen(bundle) == [0.0, 1.0]
    assert "The other 2 have eight bits" in bundle.notes[0]


def test_a_float_image_with_nan_is_a_bad_sample(tmp_path):
    deep(tmp_path, "tif", [0.0, 1.0, 2.0, 3.0])
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "cat" / "bad.tif")
    with pytest.raises(UserError, match=r"bad\.tif: holds NaN"):
        load(tmp_path)
    assert len(load(tmp_path, on_bad_sample="skip").skipped) == 1


def test_corruptions_and_the_preview_of_deep_images_are_made_of_eight_bits(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = data.load(
            "folder", path=str(deep(tmp_path, "png", [0, 100, 4000, 9])), size=8, corruptions=["contrast/3"]
        )
    x, _ = bundle.corrupted["contrast/3"].__getitems__([0])
    assert torch.isfinite(x).all()
    assert bundle.train.pixels([0]).dtype == torch.uint8
    assert preview.png(bundle).startswith(b"\x89PNG")


def test_pictures_after_the_first_and_lower_bits_that_are_lost_are_said(tmp_path):
    fill(tmp_path)
    frames = [Image.new("L", (6, 6), v) for v in (0, 200)]
    frames[0].save(tmp_path / "cat" / "film.gif", save_all=True, append_images=frames[1:])
    assert "1 of 9 image files hold several pictures" in load(tmp_path).notes[0]
