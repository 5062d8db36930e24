"""Augmentation: seeded by epoch and sample alone, within its bounds, for training only; mixing is the loss of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from stage_pieces import config, context
from torch import nn

from flatcompress import Pipeline, data
from flatcompress.data import augment as images
from flatcompress.data import colours, policies
from flatcompress.data.bundle import ImageSet, Part
from flatcompress.data.images.pixels import MemoryPixels
from flatcompress.data.signal_augment import parse
from flatcompress.errors import UserError
from flatcompress.stages import run_stage
from flatcompress.tasks import build
from flatcompress.training.mixing import Mixing

SHAPES = {"series": (2, 32), "spectrogram": (1, 20, 8), "features": (12,)}
SETTINGS = {"shift": 0.2, "noise": 0.3, "gain": 0.4, "time_mask": 0.3, "band_mask": 0.5}


def signals(shape, **settings):
    return parse(settings, 3, shape, "series")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_sample_looks_the_same_in_every_batch_and_another_way_in_every_epoch(kind):
    shape = SHAPES[kind]
    keys = {k: v for k, v in SETTINGS.items() if kind != "features" or k not in ("shift", "time_mask")}
    x = torch.randn(10, *shape)
    made = signals(shape, **keys)
    whole = made(x, torch.arange(10), 10, 4)
    some = torch.tensor([7, 2, 5])
    assert torch.equal(signals(shape, **keys)(x[some], some, 10, 4), whole[some])
    assert not torch.equal(made(x, torch.arange(10), 10, 5), whole)
    assert whole.shape == x.shape and torch.equal(signals(shape)(x, torch.arange(10), 10, 4), x)


def test_each_setting_does_what_it_says():
    x, every = torch.ones(200, 1, 20, 8), torch.arange(200)

    def made(**settings):
        return signals(SHAPES["spectrogram"], **settings)(x, every, 200, 0)

    gone = (made(time_mask=0.3) == 0).all(3).sum((1, 2))
    assert gone.min() == 0 and gone.max() == 6
    gone = (made(band_mask=0.5) == 0).all(2).sum((1, 2))
    assert gone.min() == 0 and gone.max() == 4
    shifted = made(shift=0.25)
    assert set((shifted == 0).all(3).sum((1, 2)).tolist()) == {0, 1, 2, 3, 4, 5}
    loud = made(gain=0.4).flatten(1)[:, 0]
    assert 0.6 <= loud.min() < 0.65 and 1.35 < loud.max() <= 1.4
    assert made(noise=0.3).std() == pytest.approx(0.3, rel=0.05)
    ramp = torch.arange(32.0).expand(5, 2, 32)
    moved = signals((2, 32), shift=0.2)(ramp, torch.arange(5), 5, 1)
    assert all(len(set((m[m > 0] - ramp[0, 0][m[0] > 0].repeat(2)).tolist())) == 1 for m in moved)


def test_erasing_leaves_the_older_changes_as_they_were():
    x, every = torch.rand(64, 3, 16, 16), torch.arange(64)
    plain = images.parse({"shift": 0.1, "flip": 0.5}, 0)(x, every, 64, 2)
    holes = images.parse({"shift": 0.1, "flip": 0.5, "erase": 0.5}, 0)(x, every, 64, 2)
    changed = (plain != holes).any(1).float().mean((1, 2))
    assert 0.3 < float((changed > 0).float().mean()) < 0.7
    assert changed.max() <= 0.4 and torch.equal(holes[changed == 0], plain[changed == 0])


def test_only_the_training_part_is_augmented_and_a_resumed_epoch_is_the_same():
    keys = {"train_count": 40, "val_count": 20, "test_count": 20}
    plain = data.load("drawn-heartbeats", **keys)
    found = data.load("drawn-heartbeats", augment={"noise": 0.2, "shift": 0.1}, **keys)
    rows = [3, 1, 8]
    assert not torch.equal(found.train.__getitems__(rows)[0], plain.train.__getitems__(rows)[0])
    assert torch.equal(found.test.__getitems__(rows)[0], plain.test.__getitems__(rows)[0])
    found.train.set_epoch(5)
    fifth = found.train.__getitems__(rows)[0]
    other = data.load("drawn-heartbeats", augment={"noise": 0.2, "shift": 0.1}, **keys)
    assert not torch.equal(other.train.__getitems__(rows)[0], fifth)
    other.train.set_epoch(5)
    assert torch.equal(other.train.__getitems__(rows)[0], fifth)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16), (12,)], ids=str)
def test_mixup_is_a_share_of_both_and_its_loss_too(shape):
    x, y = torch.randn(16, *shape), torch.arange(16) % 4
    mixed = Mixing(0.4, 0.0, 1)(x, 7, 0)
    torch.testing.assert_close(mixed.x, mixed.share * x + (1 - mixed.share) * x[mixed.partner])
    again, other = Mixing(0.4, 0.0, 1)(x, 7, 0), Mixing(0.4, 0.0, 1)(x, 8, 0)
    assert torch.equal(again.x, mixed.x) and not torch.equal(other.x, mixed.x)
    logits, loss = torch.randn(16, 4), build("classification").loss
    both = mixed.share * loss(logits, y) + (1 - mixed.share) * loss(logits, y[mixed.partner])
    one, two = (nn.functional.one_hot(t, 4).float() for t in (y, y[mixed.partner]))
    torch.testing.assert_close(both, nn.functional.cross_entropy(logits, mixed.share * one + (1 - mixed.share) * two))


@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 40)], ids=str)
def test_cutmix_puts_a_piece_of_another_in(shape):
    own, other = torch.zeros(8, *shape), torch.arange(1, 9.0).view(-1, *[1] * len(shape)).expand(8, *shape)
    for step in range(20):
        mixing = Mixing(0.0, 1.0, 0)
        shares = mixing(other, step, 0)
        foreign = shares.x != other
        moved = shares.partner != torch.arange(8)
        assert foreign[moved].float().mean(tuple(range(1, 1 + len(shape)))).allclose(torch.tensor(1 - shares.share))
        assert not bool(foreign[~moved].any()) and torch.equal(mixing(own, step, 0).x, own)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def test_a_mixed_run_trains_twice_the_same_and_another_way_than_a_plain_one():
    augment = {"mixup": 0.4, "cutmix": 1.0, "time_mask": 0.2}

    def run(**keys):
        bundle = data.load("drawn-heartbeats", train_count=60, val_count=24, test_count=24, **keys)
        work = context(net, batch_size=15)
        work.data = bundle
        run_stage("train", work, config("train", method="sam", select="last", accumulate=2))
        return work.model.state_dict()

    first, again, plain = run(augment=augment), run(augment=augment), run()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, plain[name]) for name, value in first.items())


WRONG = [
    ("series", {"flip": 0.5}, "augment setting 'flip'"),
    ("series", {"shift": 2}, "between 0 and 1"),
    ("series", {"mixup": -1}, "between 0 and 10"),
    ("series", "standard", "presets are for images"),
    ("features", {"time_mask": 0.1}, "have no time"),
    ("features", {"cutmix": 0.1}, "have no time"),
]


@pytest.mark.parametrize(("kind", "option", "reason"), WRONG, ids=str)
def test_a_setting_that_makes_no_sense_is_refused(kind, option, reason):
    with pytest.raises(UserError, match=reason):
        parse(option, 0, SHAPES[kind], "series")


POLICIES = {"trivial": {"trivial": 1.0}, "rand": {"rand": 2, "magnitude": 12}}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_changes_a_sample_alone_and_keeps_its_range(kind, channels):
    x, every = torch.rand(40, channels, 12, 16), torch.arange(40)
    made = images.parse(POLICIES[kind], 3)
    whole = made(x, every, 40, 2)
    assert whole.shape == x.shape and float(whole.min()) >= 0 and float(whole.max()) <= 1
    some = torch.tensor([30, 1, 8])
    torch.testing.assert_close(images.parse(POLICIES[kind], 3)(x[some], some, 40, 2), whole[some])
    assert not torch.equal(made(x, every, 40, 3), whole)
    still = (whole - x).abs().flatten(1).amax(1) < 1e-6
    assert 0 <= int(still.sum()) < 20  # identity is one of fourteen


@pytest.mark.parametrize("name", policies.CHANGES)
def test_an_operation_at_no_strength_is_the_image_and_at_full_strength_is_pillow_s(name):
    g = torch.Generator().manual_seed(0)
    side = 256 if name == "equalize" else 20  # Pillow equalizes in whole steps of pixels
    x = torch.randint(0, 256, (1, 3, side, side), generator=g).float() / 255
    nothing, full, sign = torch.zeros(1), torch.ones(1), torch.ones(1)
    if name in ("autocontrast", "equalize"):
        x = 0.2 + 0.5 * x
        x = (x * 255).round() / 255
    elif name != "solarize":  # its threshold of 1 turns what is white
        torch.testing.assert_close(policies.CHANGES[name](x, nothing, sign), x, atol=1e-5, rtol=0)
    picture = Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = {
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(1.9),
        "color": lambda: ImageEnhance.Color(picture).enhance(1.9),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1.9),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(1.9),
        "posterize": lambda: ImageOps.posterize(picture, 4),
        "solarize": lambda: ImageOps.solarize(picture, 0),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
    }.get(name)
    found = policies.CHANGES[name](x, full, sign)
    if theirs is not None:
        wanted = torch.from_numpy(np.asarray(theirs()).copy()).permute(2, 0, 1).float() / 255
        assert float((found[0] - wanted).abs().mean()) < 0.01
    elif name != "identity":
        assert float((found - x).abs().mean()) > 0.02


def brighter(by: float = 0.1):
    """What a recipe names in the tests below: it draws from torch, as torchvision's transforms do."""
    return lambda image: (image + by * torch.rand(1)).clamp(0, 1)


def spoiled(how: str):
    ways = {
        "shape": lambda x: x[:, 1:],
        "range": lambda x: x * 255,
        "nothing": lambda x: None,
        "error": lambda x: x[99],
    }
    return ways[how]


def test_a_named_transform_is_drawn_by_the_sample_and_leaves_torch_s_generator_alone():
    x, every = 0.5 * torch.rand(8, 3, 6, 6), torch.arange(8)
    option = {"transform": f"{__name__}:brighter", "options": {"by": 0.5}, "flip": 0.5}
    before = torch.get_rng_state()
    whole = images.parse(option, 1)(x, every, 8, 4)
    assert torch.equal(before, torch.get_rng_state())
    some = torch.tensor([5, 2])
    assert torch.equal(images.parse(option, 1)(x[some], some, 8, 4), whole[some])
    gained = images.parse(f"{__name__}:brighter", 1)(x, every, 8, 0) - x
    assert len({round(float(one.max()), 5) for one in gained}) == 8


@pytest.mark.parametrize("how", ["shape", "range", "nothing", "error"])
def test_a_named_transform_that_spoils_an_image_is_said(how):
    said = {
        "shape": "wanted the same",
        "range": "images are 0..1",
        "nothing": "NoneType",
        "error": "failed on an image",
    }
    made = images.parse({"transform": f"{__name__}:spoiled", "options": {"how": how}}, 0)
    with pytest.raises(UserError, match=said[how]):
        made(torch.rand(2, 3, 6, 6), torch.arange(2), 2, 0)


WRONG_IMAGES = {
    "nowhere:made": "cannot be made: ModuleNotFoundError",
    "math:pi": "cannot be made: TypeError",
    "standart": "Did you mean 'standard'",
}


@pytest.mark.parametrize("option", [*WRONG_IMAGES, {"rand": 0.5}, {"rand": 2, "trivial": 1}, {"options": {}}], ids=str)
def test_a_policy_or_transform_that_there_is_not_is_refused(option):
    with pytest.raises(UserError, match=WRONG_IMAGES[option] if isinstance(option, str) else "augment"):
        images.parse(option, 0)


@pytest.mark.parametrize("settings", [{"shift": 0.2}, {"flip": 1.0}, {"crop": 0.3, "flip": 0.5}], ids=str)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_a_box_of_whole_pixels_is_where_its_affine_map_says(settings, kind):
    x = nn.functional.interpolate(torch.rand(12, 3, 5, 6), size=(24, 30), mode="bicubic").clamp(0, 1)
    x = (x * 255).round().to(kind) if kind == torch.uint8 else x
    made, rows = images.parse(settings, 1), torch.arange(12)
    grid = nn.functional.affine_grid(made.theta(rows, 12, 0, x.shape), list(x.shape), align_corners=False)
    border = "zeros" if "shift" in settings else "border"
    floats = x.float() / 255 if kind == torch.uint8 else x
    there = nn.functional.grid_sample(floats, grid, padding_mode=border, align_corners=False)
    inner = slice(2, -2) if "crop" in settings else slice(None)  # a crop does not look beyond its box
    found = (made(x, rows, 12, 0) - there)[..., inner, inner]
    assert float(found.abs().max()) < (0.01 if kind == torch.uint8 else 1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_map_of_the_colours_is_brightness_contrast_saturation_hue_and_grey_in_turn(channels):
    x, draws, grey = torch.rand(6, channels, 8, 9), torch.rand(6, 4), torch.arange(6) % 3 == 0
    mean, std = torch.rand(channels, 1, 1), 0.2 + torch.rand(channels, 1, 1)
    found = torch.empty_like(x)
    colours.maps(draws, 0.3, grey, channels).apply(x, slice(None), mean, std, found)
    bright, contrast, saturation = (1 + 0.3 * (2 * draws[:, :3] - 1)).T.reshape(3, -1, 1, 1, 1)
    wanted = x * bright
    middle = wanted.mean((1, 2, 3), keepdim=True)
    wanted = middle + (wanted - middle) * contrast
    if channels == 3:
        weights = torch.tensor(colours.LUMA).view(1, 3, 1, 1)
        shade = (wanted * weights).sum(1, keepdim=True)
        wanted = shade + (wanted - shade) * saturation
        wanted = torch.einsum("bij,bjhw->bihw", colours.hue((2 * draws[:, 3] - 1) * 0.3), wanted)
        shade = (wanted * weights).sum(1, keepdim=True).expand_as(wanted)
        wanted = torch.where(grey.view(-1, 1, 1, 1), shade, wanted)
    torch.testing.assert_close(found, (wanted.clamp(0, 1) - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("augment", ["domainbed", "standard", "rand", {"crop": 0.2, "erase": 0.5}], ids=str)
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(augment):
    n, where = 9, torch.zeros(9, dtype=torch.int64)
    stored = MemoryPixels((torch.rand(n, 3, 17, 23) * 255).to(torch.uint8))
    part = Part(stored, torch.arange(n), where, where, where)
    found = ImageSet(part, [0.4] * 3, [0.2] * 3, images.parse(augment, 2))
    whole = found.__getitems__(list(range(n)))[0]
    assert all(torch.equal(found[i][0], whole[i]) for i in range(n))


def test_a_policy_does_not_move_pixels_away_from_their_masks():
    section = {"size": 16, "train_count": 16, "val_count": 8, "test_count": 8, "corruptions": "none"}
    task = {"name": "segmentation", "ignore_index": 255}
    with pytest.warns(UserWarning, match="operations that move pixels"):
        found = data.load("drawn-scenes", task=task, augment="trivial", **section)
    assert found.train.augment.moving is False
    with pytest.raises(UserError, match="targets of task 'segmentation' lie at pixels"):
        data.load("drawn-scenes", task=task, augment=f"{__name__}:brighter", **section)
    with pytest.raises(UserError, match="name an ignore_index"):
        data.load("drawn-scenes", task="segmentation", augment={"shift": 0.1}, **section)


def test_masks_move_with_their_pixels_and_what_comes_from_outside_is_ignored():
    task = build({"name": "segmentation", "ignore_index": 9})
    masks = torch.randint(0, 4, (12, 16, 16))
    made, rows = images.parse({"shift": 0.3, "flip": 0.5}, 2), torch.arange(12)
    pictures = made((masks + 1)[:, None].float() / 10, rows, 12, 0)[:, 0] * 10 - 1
    moved = task.moved(masks, made.theta(rows, 12, 0, (16, 16)))
    sharp = (pictures - pictures.round()).abs() < 1e-3
    same = (moved == pictures.round()) | (moved == 9)
    assert float(same[sharp].float().mean()) > 0.97 and bool((moved == 9).any())


def test_masks_are_not_mixed():
    section = {"name": "drawn-scenes", "size": 16, "train_count": 16, "val_count": 8, "test_count": 8}
    stages = [{"train": {"epochs": 1}}]
    model = {"name": "flatcompress.models.task_nets:unet", "width": 4}
    with pytest.raises(UserError, match="mix whole targets"):
        Pipeline(
            model,
            {**section, "augment": {"mixup": 0.4}},
            stages,
            task={"name": "segmentation", "ignore_index": 255},
            batch_size=8,
        ).prepare()
