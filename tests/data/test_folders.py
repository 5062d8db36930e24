"""The user's own images: what is read, how it is split, and every way in which it can be wrong."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress import data
from flatcompress.errors import UserError


def fill(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 10) -> Path:
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (12, 10), (90 * index + 5, 20 * i % 255, 40)).save(folder / name / f"{i:02}.png")
    return folder


def domains(folder: Path) -> Path:
    for domain in ("art", "photo", "sketch"):
        fill(folder / domain)
    return folder


def test_folder_of_classes_is_split_without_overlap(tmp_path):
    bundle = data.load("folder", path=str(fill(tmp_path)), size=8, corruptions="none")
    assert bundle.classes == ("cat", "dog")
    assert bundle.input_shape == (3, 8, 8)
    parts = [set(s.identities.tolist()) for s in (bundle.train, bundle.val, bundle.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    x, y = bundle.train.__getitems__([0, 1])
    assert x.shape == (2, 3, 8, 8)
    assert y.dtype == torch.int64


def test_fixed_train_and_val_folders_are_kept(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", n=4)
    bundle = data.load("folder", path=str(tmp_path), size=8, corruptions="none")
    assert len(bundle.test) == 8
    assert len(bundle.train) + len(bundle.val) == 20


def test_held_out_domain_is_never_trained_on(tmp_path):
    bundle = data.load("domains", path=str(domains(tmp_path)), held_out="sketch", size=8, corruptions="none")
    assert bundle.domains == ("art", "photo", "sketch")
    assert set(bundle.held_out.domain_ids.tolist()) == {2}
    for part in (bundle.train, bundle.val, bundle.test):
        assert set(part.domain_ids.tolist()) == {0, 1}
    assert len(bundle.held_out) == 20
    again = data.load("domains", path=str(tmp_path), held_out="sketch", size=8, corruptions="none")
    assert torch.equal(again.train.identities, bundle.train.identities)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1", "F"])
def test_every_image_mode_becomes_eight_bit_rgb(mode: str, tmp_path):
    fill(tmp_path)
    suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 65535, np.uint16))
    else:
        image = Image.new("RGB", (6, 6), "white").convert(mode if mode != "LA" else "L")
        image = image.convert("LA") if mode == "LA" else image
    image.save(tmp_path / "cat" / f"odd.{suffix}")
    bundle = data.load("folder", path=str(tmp_path), size=4, corruptions="none")
    whole = [s.pixels(range(len(s))) for s in (bundle.train, bundle.val, bundle.test)]
    assert torch.cat(whole).amin((1, 2, 3)).max() >= 250  # the white image stayed white


def damaged(change):
    def make(root: Path) -> dict:
        fill(root)
        change(root)
        return {"path": str(root)}

    return make


def _truncate(root: Path) -> None:
    whole = (root / "cat" / "00.png").read_bytes()
    (root / "cat" / "00.png").write_bytes(whole[: len(whole) // 2])


def _outside(root: Path) -> None:
    outside = root.parent / "elsewhere.png"
    Image.new("RGB", (4, 4)).save(outside)
    (root / "cat" / "link.png").symlink_to(outside)


def _ring(root: Path) -> None:
    (root / "ring").symlink_to(root / "ring")


def _unreadable(root: Path) -> None:
    (root / "dog" / "00.png").chmod(0)


BAD = {
    "path_missing": (lambda r: {"path": str(r / "none")}, "does not exist"),
    "path_not_given": (lambda r: {}, "path"),
    "path_is_a_number": (lambda r: {"path": 7}, "found 7"),
    "path_is_a_file": (damaged(lambda r: None), None),
    "no_classes": (lambda r: {"path": str(r)}, "found none"),
    "one_class": (lambda r: {"path": str(fill(r, ("only",)))}, "found only"),
    "empty_class": (damaged(lambda r: (r / "bird").mkdir()), "bird: the class is empty"),
    "class_without_images": (
        damaged(lambda r: ((r / "bird").mkdir(), (r / "bird" / "notes.txt").write_text("x"))),
        "bird: the class is empty",
    ),
    "truncated": (damaged(_truncate), "00.png"),
    "text_as_png": (damaged(lambda r: (r / "dog" / "t.png").write_text("no picture")), "t.png: not an image"),
    "zero_bytes": (damaged(lambda r: (r / "dog" / "z.png").write_bytes(b"")), "z.png: empty file"),
    "link_outside": (damaged(_outside), "outside of the data folder"),
    "link_ring": (damaged(_ring), "ring"),
    "too_few_to_split": (lambda r: {"path": str(fill(r, n=2))}, "2 usable images"),
    "size_zero": (lambda r: {"path": str(fill(r)), "size": 0}, "'size'"),
    "size_text": (lambda r: {"path": str(fill(r)), "size": "big"}, "'size'"),
    "channels_two": (lambda r: {"path": str(fill(r)), "channels": 2}, "'channels'"),
    "negative_limit": (lambda r: {"path": str(fill(r)), "limit": -1}, "'limit'"),
    "policy_unknown": (lambda r: {"path": str(fill(r)), "on_bad_sample": "ignore"}, "error or skip"),
    "fractions_too_large": (lambda r: {"path": str(fill(r)), "val_fraction": 0.6, "test_fraction": 0.6}, "fractions"),
    "option_unknown": (lambda r: {"path": str(fill(r)), "szie": 8}, "'size'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_is_a_clear_error(name: str, tmp_path):
    make, message = BAD[name]
    root = tmp_path / "root"
    root.mkdir()
    options = make(root)
    if name == "path_is_a_file":
        options, message = {"path": str(root / "cat" / "00.png")}, "is a file"
    with pytest.raises(UserError) as caught:
        data.load("folder", **{"size": 8, "corruptions": "none"} | options)
    assert message in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path):
    options = damaged(_unreadable)(tmp_path)
    with pytest.raises(UserError, match=r"00\.png"):
        data.load("folder", **options)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    from flatcompress.data.images import decoding

    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    with pytest.raises(UserError, match="12 x 10 pixels"):
        data.load("folder", path=str(fill(tmp_path)), size=8)


BAD_DOMAINS = {
    "one_domain": (lambda r: fill(r / "art"), "art", "two domains"),
    "unknown": (domains, "sketsh", "'sketch'"),
    "not_given": (domains, None, "held_out"),
    "other_classes": (lambda r: fill(domains(r) / "toy", ("cat", "bird")), "art", "differ in bird, dog"),
}


@pytest.mark.parametrize("name", BAD_DOMAINS)
def test_bad_domains_are_a_clear_error(name: str, tmp_path):
    make, held_out, message = BAD_DOMAINS[name]
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        data.load("domains", path=str(tmp_path), held_out=held_out, size=8)
    assert message in str(caught.value)


def test_bad_images_can_be_skipped_and_are_counted(tmp_path):
    fill(tmp_path)
    _truncate(tmp_path)
    (tmp_path / "dog" / "z.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="2 bad images"):
        bundle = data.load("folder", path=str(tmp_path), size=8, on_bad_sample="skip", corruptions="none")
    assert len(bundle.skipped) == 2
    assert len(bundle.train) + len(bundle.val) + len(bundle.test) == 19


def test_sets_too_large_for_memory_are_decoded_as_they_are_read(tmp_path, monkeypatch):
    from flatcompress.data.images import reading

    kept = data.load("folder", path=str(fill(tmp_path)), size=8, corruptions="none")
    monkeypatch.setattr(reading, "MOST_BYTES", 100)
    lazy = data.load("folder", path=str(tmp_path), size=8, corruptions="none")
    assert torch.equal(kept.train.__getitems__([3, 1])[0], lazy.train.__getitems__([3, 1])[0])
    (tmp_path / "dog" / "t.png").write_text("no picture")
    with pytest.raises(UserError, match=r"t\.png"):
        data.load("folder", path=str(tmp_path), size=8)


# ------------------------------------------------------------------------------------------------ CIFAR-10 and MNIST


def cifar(root: Path, n: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        records = rng.integers(0, 256, (n, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(n) % 10
        (root / f"{name}.bin").write_bytes(records.tobytes())
    return root


def idx(array: np.ndarray, magic: int) -> bytes:
    return magic.to_bytes(4, "big") + b"".join(d.to_bytes(4, "big") for d in array.shape) + array.tobytes()


def mnist(root: Path, packed: bool = False) -> Path:
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 60), ("t10k", 20)):
        files = {
            f"{prefix}-images-idx3-ubyte": idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), 0x803),
            f"{prefix}-labels-idx1-ubyte": idx((np.arange(n) % 10).astype(np.uint8), 0x801),
        }
        for name, content in files.items():
            target = root / (f"{name}.gz" if packed else name)
            target.write_bytes(gzip.compress(content) if packed else content)
    return root


def test_cifar_records_become_images(tmp_path):
    bundle = data.load("cifar10", path=str(cifar(tmp_path)), corruptions="none")
    assert bundle.input_shape == (3, 32, 32)
    assert len(bundle.classes) == 10
    assert len(bundle.train) + len(bundle.val) == 40
    raw = np.frombuffer((tmp_path / "test_batch.bin").read_bytes(), np.uint8).reshape(20, 3073)
    assert np.array_equal(bundle.test.pixels([4])[0].numpy(), raw[4, 1:].reshape(3, 32, 32))


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_idx_files_become_images(packed: bool, tmp_path):
    bundle = data.load("mnist", path=str(mnist(tmp_path, packed)), size=16, corruptions="none")
    assert bundle.input_shape == (1, 16, 16)
    assert len(bundle.test) == 20


BAD_BINARIES = {
    "cifar_cut_off": (
        "cifar10",
        lambda r: (cifar(r) / "test_batch.bin").write_bytes(bytes(3000)),
        "not a whole number",
    ),
    "cifar_label": ("cifar10", lambda r: (cifar(r) / "test_batch.bin").write_bytes(bytes([99]) * 3073), "label 99"),
    "cifar_pickled": ("cifar10", lambda r: (r / "data_batch_1").write_bytes(b"x"), "pickles"),
    "mnist_absent": ("mnist", lambda r: None, "train-images-idx3-ubyte"),
    "mnist_cut_off": (
        "mnist",
        lambda r: (mnist(r) / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((60, 28, 28), np.uint8), 0x803)[:-9]),
        "cut off",
    ),
    "mnist_magic": (
        "mnist",
        lambda r: (mnist(r) / "train-labels-idx1-ubyte").write_bytes(b"GIF89a"),
        "not an idx file",
    ),
    "mnist_counts": (
        "mnist",
        lambda r: (mnist(r) / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8), 0x801)),
        "20 test images but 3 labels",
    ),
    "mnist_bad_gzip": (
        "mnist",
        lambda r: (mnist(r, packed=True) / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot gzip at all"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD_BINARIES)
def test_bad_binary_files_are_a_clear_error(name: str, tmp_path):
    dataset, spoil, message = BAD_BINARIES[name]
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        data.load(dataset, path=str(tmp_path))
    assert message in str(caught.value)
