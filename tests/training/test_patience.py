"""Early stopping: training ends after so many epochs without a better one, and keeps the best."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import Pipeline
from flatcompress.errors import UserError

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = {"train": (X[:40], Y[:40]), "test": (X[40:], Y[40:])}


def run(folder, **keys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    epochs: list[dict] = []
    stage = {"train": {"method": "none", "epochs": 12, "schedule": "constant", **keys}}
    Pipeline(net, DATA, [stage], device="cpu", threads=1, batch_size=8).run(folder, display=epochs.append)
    return [e["val_accuracy"] for e in epochs if e["event"] == "epoch"]


@pytest.mark.filterwarnings("ignore")
def test_training_ends_once_no_epoch_was_better_for_so_long(tmp_path):
    whole = run(tmp_path / "whole")
    short = run(tmp_path / "short", patience=2)
    assert len(whole) == 12 and short == whole[: len(short)]
    since = [i for i in range(len(short)) if short[i] > max(short[:i], default=-1)][-1]
    assert len(short) == min(12, since + 3) < 12


def test_patience_with_the_last_epoch_is_refused():
    with pytest.raises(UserError, match="waits for a better epoch"):
        Pipeline("resnet8", "rotated-digits", [{"train": {"patience": 2, "select": "last"}}])
