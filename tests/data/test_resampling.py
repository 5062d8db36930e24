"""Long tails and samples that come several times: counts by hand, and nothing changes where nothing is asked."""

from __future__ import annotations

import pytest
import torch

from flatcompress import data
from flatcompress.data.resampling import Resampled, tail_counts
from flatcompress.errors import UserError

FEW = {"train_count": 80, "val_count": 24, "test_count": 24, "held_out_count": 24, "size": 12, "corruptions": "none"}


def test_counts_of_a_long_tail_by_hand():
    # n_i = 64 * 16^(-i/4): 64, 32, 16, 8, 4; a class keeps at most what it has, and never nothing.
    assert tail_counts([64] * 5, 16) == [64, 32, 16, 8, 4]
    assert tail_counts([64, 20, 64, 64, 2], 16) == [64, 20, 16, 8, 2]
    assert tail_counts([5, 5, 5], 1000) == [5, 1, 1]


def test_a_long_tail_thins_the_training_part_alone():
    plain = data.load("styled-shapes", **FEW)
    assert torch.equal(data.load("styled-shapes", long_tail=1, **FEW).train.labels, plain.train.labels)
    with pytest.warns(UserWarning, match="long_tail 10: .* of 240 training samples, 21 to 2 of a class"):
        tailed = data.load("styled-shapes", long_tail=10, **FEW)
    counts = torch.bincount(tailed.train.labels).tolist()
    assert counts == tail_counts(torch.bincount(plain.train.labels).tolist(), 10) and counts[0] >= 10 * counts[-1]
    assert len(tailed.val) == len(plain.val) and len(tailed.test) == len(plain.test)
    whole = {tuple(row.flatten().tolist()) for row in plain.train.pixels(range(240))}
    assert all(tuple(row.flatten().tolist()) in whole for row in tailed.train.pixels(range(sum(counts))))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [("styled-shapes", {"long_tail": 0.5, **FEW}, "from 1, found 0.5"),
     ("drawn-gauges", {"long_tail": 10}, "has no classes"),
     ("drawn-heartbeats", {"long_tail": 10}, "leave 'long_tail' out")],
)  # fmt: skip
def test_a_long_tail_that_cannot_be_had_is_an_error(name, options, said):
    with pytest.raises(UserError, match=said):
        data.load(name, **options)


@pytest.mark.parametrize("wrapped", [False, True])
def test_resampled_parts_hold_the_rows_that_were_asked_for(wrapped):
    train = data.load("styled-shapes", augment={"shift": 1}, **FEW).train
    train.set_epoch(3)
    rows = torch.tensor([5, 2, 2])
    found = Resampled(train, rows) if wrapped else data.resampled(train, rows)
    x, y = found.__getitems__([0, 1, 2])
    assert len(found) == 3 and torch.equal(y, train.labels[rows]) and len(x) == 3
    every = data.resampled(train, torch.arange(len(train)))
    assert torch.equal(every.__getitems__([7, 8])[0], train.__getitems__([7, 8])[0])
