"""Augmentation: seeded by epoch and sample alone, within its bounds, for training only; mixing is the loss of both."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import config, context
from torch import nn

from flatcompress import Pipeline, data
from flatcompress.data import augment as images
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
