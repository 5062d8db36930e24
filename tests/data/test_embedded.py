"""The embedded data sets, the corruptions, augmentation and a program's own data: properties, not pictures."""

from __future__ import annotations

import pytest
import torch

from flatcompress import data
from flatcompress.data import preview
from flatcompress.data.corruptions import CORRUPTIONS, corrupt
from flatcompress.data.embedded.rotated_digits import digits
from flatcompress.errors import UserError

SMALL_SHAPES = {"train_count": 48, "val_count": 24, "test_count": 24, "held_out_count": 36, "cache": False}


def whole(images) -> torch.Tensor:
    return images.pixels(range(len(images)))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    found, (images, labels) = load_digits(), digits()
    assert torch.equal(images[:, 0], torch.from_numpy(found.images).float() / 16)
    assert torch.equal(labels, torch.from_numpy(found.target))


@pytest.mark.parametrize("held_out", ["0", "45", "75"])
def test_no_digit_is_in_two_parts_and_the_unseen_domain_stays_unseen(held_out: str):
    bundle = data.load("rotated-digits", held_out=held_out, size=8, corruptions="none")
    ids = [set(part.identities.tolist()) for part in (bundle.train, bundle.val, bundle.test)]
    assert ids[0] | ids[1] | ids[2] == set(range(1797))
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    unseen = bundle.domains.index(held_out)
    for part in (bundle.train, bundle.val, bundle.test):
        assert unseen not in part.domain_ids.tolist()
    assert set(bundle.held_out.domain_ids.tolist()) == {unseen}
    assert set(bundle.held_out.identities.tolist()) == ids[2]


@pytest.mark.parametrize("name", ["rotated-digits", "styled-shapes"])
def test_same_seed_same_bits_and_another_seed_another_split(name: str):
    options = SMALL_SHAPES if name == "styled-shapes" else {"size": 8}
    first, again, other = (data.load(name, seed=s, corruptions="none", **options) for s in (0, 0, 1))
    assert torch.equal(whole(first.train), whole(again.train))
    assert not torch.equal(whole(first.train), whole(other.train))


@pytest.mark.parametrize("held_out", ["photo", "art", "cartoon", "sketch"])
def test_styles_hold_every_class_equally_and_one_stays_unseen(held_out: str):
    bundle = data.load("styled-shapes", held_out=held_out, corruptions="none", **SMALL_SHAPES)
    assert len(bundle.classes) >= 12
    assert torch.bincount(bundle.train.labels).unique().numel() == 1
    assert bundle.domains.index(held_out) not in bundle.train.domain_ids.tolist()
    parts = [set(p.identities.tolist()) for p in (bundle.train, bundle.val, bundle.test, bundle.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_more_images_begin_with_the_same_images():
    few = data.load("styled-shapes", corruptions="none", **SMALL_SHAPES)
    many = data.load("styled-shapes", corruptions="none", **SMALL_SHAPES | {"held_out_count": 60})
    assert torch.equal(whole(few.held_out), whole(many.held_out)[:36])


@pytest.mark.parametrize("size", [12, 33])
def test_shapes_come_in_any_size(size: int):
    bundle = data.load("styled-shapes", size=size, corruptions="none", **SMALL_SHAPES)
    assert bundle.input_shape == (3, size, size)


def test_damaged_and_unwritable_caches_cost_a_warning_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATCOMPRESS_CACHE", str(tmp_path))
    options = SMALL_SHAPES | {"cache": True}
    first = data.load("styled-shapes", corruptions="none", **options)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert files
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="damaged"):
        again = data.load("styled-shapes", corruptions="none", **options)
    assert torch.equal(whole(first.train), whole(again.train))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    monkeypatch.setenv("FLATCOMPRESS_CACHE", str(in_the_way))
    with pytest.warns(UserWarning, match="cache"):
        data.load("styled-shapes", corruptions="none", **options)


BAD = {
    "size_tiny": ("rotated-digits", {"size": 4}, "size"),
    "copies_many": ("rotated-digits", {"copies": 9}, "copies"),
    "domain_unknown": ("rotated-digits", {"domains": ["0", "17"]}, "17"),
    "domain_held_out_too": ("rotated-digits", {"domains": ["75"], "held_out": "75"}, "held out"),
    "option_type": ("rotated-digits", {"size": "16"}, "size"),
    "shapes_count": ("styled-shapes", {"train_count": 3}, "train_count"),
    "shapes_style": ("styled-shapes", {"held_out": "foto"}, "'photo'"),
    "corruption_unknown": ("rotated-digits", {"corruptions": ["gausian_noise"]}, "'gaussian_noise'"),
    "severity_six": ("rotated-digits", {"corruptions": ["contrast/6"]}, "6"),
    "mean_length": ("rotated-digits", {"mean": [0.5, 0.5]}, "mean"),
    "std_zero": ("rotated-digits", {"std": [0.0]}, "std"),
    "name_unknown": ("rotated-digit", {}, "'rotated-digits'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_a_clear_error(name: str):
    dataset, options, message = BAD[name]
    with pytest.raises(UserError) as caught:
        data.load(dataset, **options)
    assert message in str(caught.value)


def pictures(size: int = 24, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, channels, 6, 6, generator=generator) * 255
    return torch.nn.functional.interpolate(smooth, size=(size, size), mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
def test_corruptions_grow_with_severity_and_repeat_bit_for_bit(kind: str):
    clean = pictures()
    changes = []
    for severity in range(1, 6):
        changed = corrupt(clean, kind, severity)
        assert changed.dtype == torch.uint8
        assert changed.shape == clean.shape
        assert torch.equal(changed, corrupt(clean, kind, severity))
        changes.append(float((changed.float() - clean.float()).abs().mean()))
    assert changes[0] > 0
    assert changes[-1] > changes[0]


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (17, 3), (64, 1)])
def test_corruptions_take_any_size_and_one_or_three_channels(size: int, channels: int):
    clean = pictures(size, channels)
    for kind in CORRUPTIONS:
        assert corrupt(clean, kind, 3).shape == clean.shape


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    bundle = data.load("rotated-digits", size=12, augment="standard", corruptions="none")
    train = bundle.train
    train.set_epoch(0)
    one = train.__getitems__([5, 6])[0]
    assert torch.equal(one[1:], train.__getitems__([6])[0])
    train.set_epoch(1)
    assert not torch.equal(one, train.__getitems__([5, 6])[0])
    train.set_epoch(0)
    assert torch.equal(one, train.__getitems__([5, 6])[0])
    assert torch.equal(bundle.val.__getitems__([0])[0], bundle.val.__getitems__([0])[0])


def test_preview_shows_a_row_per_domain_and_corruption():
    bundle = data.load("rotated-digits", size=8, corruptions=["contrast/3"])
    sheet = preview.sheet(bundle)
    assert sheet.mode == "RGB"
    assert sheet.height > sheet.width / 4


def test_own_data_becomes_a_bundle_and_wrong_parts_are_named():
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 4
    bundle = data.bundle({"train": (x, y), "test": (x[:8], y[:8])})
    assert len(bundle.train) + len(bundle.val) == 40
    assert bundle.classes == ("0", "1", "2", "3")
    pairs = [(x[i].numpy(), int(y[i])) for i in range(12)]
    assert torch.equal(data.bundle({"train": (x, y), "test": pairs}).test.__getitems__([3])[0], x[3:4])
    for wrong, message in (
        ({"train": (x, y)}, "'test' is missing"),
        ({"train": (x, y[:9]), "test": (x, y)}, "data['train']"),
        ({"train": (x[0], y[:8]), "test": (x, y)}, "[N, C, H, W]"),
        ({"train": (x, y), "test": (x[:0], y[:0])}, "data['test'] is empty"),
        ({"train": (x, y), "test": (x, y), "classes": ["a"]}, "1 classes are named"),
        ({"train": (x, y), "tset": (x, y)}, "'test'"),
        (7, "a DataBundle or a mapping"),
    ):
        with pytest.raises(UserError) as caught:
            data.bundle(wrong)
        assert message in str(caught.value)
