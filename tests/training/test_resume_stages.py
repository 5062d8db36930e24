"""A run stopped in the middle of a stage and gone on with ends in the very bits of an undisturbed one."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_net import TinyNet
from torch import nn

from flatcompress import Pipeline, data
from flatcompress.data.images import reading
from flatcompress.errors import Interrupted
from flatcompress.session import Progress

TRAIN = {
    "sgd with momentum": {"method": "none", "optimizer": {"name": "sgd", "lr": 0.1}},
    "ema": {"method": "sam", "averaging": "ema"},
    "swa": {"method": "sam", "averaging": "swa"},
    "swad": {"method": "sagm", "averaging": "swad"},
    "looksam": {"method": "looksam", "k": 2},
    "gam": {"method": "gam"},
    "friendlysam": {"method": "friendlysam"},
    "esam": {"method": "esam"},
    "ssam": {"method": "ssam"},
    "tram": {"method": "tram"},
    "msam": {"method": "msam", "optimizer": {"name": "sgd", "lr": 0.1}},
    "rsam": {"method": "rsam"},
}
PRUNE = {
    "adasap": {"method": "adasap"},
    "running taylor scores": {"method": "taylor"},
    "masksparsity": {"method": "masksparsity"},
    "growing_reg": {"method": "growing_reg"},
}
QUANTIZE = {
    "gaqat": {"method": "gaqat", "K": 2},
    "squat": {"method": "squat"},
    "qt_dog": {"method": "qt_dog"},
    "lsq+ with distillation": {"method": "lsq_sam", "quantizer": "lsq+", "distill": 0.5},
    "oscillations": {"method": "lsq", "oscillation_threshold": 0.02, "dampen": 0.1},
}
FLOAT = [{"train": {"method": "none", "epochs": 1}}]
CASES = {
    **{f"train: {k}": [{"train": {"epochs": 3, **v}}] for k, v in TRAIN.items()},
    **{f"prune: {k}": [*FLOAT, {"prune": {"epochs": 3, "schedule_steps": 2, **v}}] for k, v in PRUNE.items()},
    "sparsify": [*FLOAT, {"sparsify": {"epochs": 3, "schedule_steps": 2, "sparsity": 0.6}}],
    **{f"quantize: {k}": [*FLOAT, {"quantize": {"epochs": 3, **v}}] for k, v in QUANTIZE.items()},
}


@pytest.fixture(scope="module")
def bundle():
    return data.load("rotated-digits", domains=["0"], size=8, test_fraction=0.6, corruptions="none", corrupted_count=8)


@pytest.fixture
def only_training(monkeypatch):
    """What is measured after a stage has its own tests; here it would only take time."""

    def row(work, stage, method, seconds, passes, flatness=True):
        return {"stage": stage, "method": method, "passes": passes, "seconds": seconds}

    monkeypatch.setattr("flatcompress.pipeline.measure", row)
    monkeypatch.setattr("flatcompress.pipeline.dry_run", lambda work, stages: None)
    monkeypatch.setattr("flatcompress.session.Session.report", lambda self: None)


def run(bundle, stages, folder, monkeypatch, stop_at=(), model=TinyNet, workers=0, **given):
    """Run to the end, cut off after the save at each of these steps of the last stage; returns the result and cuts."""
    stops, cuts = list(stop_at), []
    last = f"{len(stages) - 1}-"
    save = Progress.save

    def saved(self, step, state):
        if not stops or step != stops[0] or not self._session._stage.startswith(last):
            return
        save(self, step, state)
        cuts.append(stops.pop(0))
        raise Interrupted(f"cut off at {step}")

    monkeypatch.setattr(Progress, "save", saved)
    try:
        while True:
            torch.manual_seed(7)
            made = model(10)
            torch.rand(len(cuts))  # whatever a process drew before must not matter
            options = {"batch_size": 128, "device": "cpu", "checkpoint_every": 1, "threads": 1, **given}
            try:
                pipeline = Pipeline(model=made, data=bundle, stages=stages, **options)
                pipeline.recipe.data.workers = workers
                return pipeline.run(folder), cuts
            except Interrupted:
                continue
    finally:
        monkeypatch.setattr(Progress, "save", save)


SLOW = {"looksam", "gam", "friendlysam", "esam", "tram", "msam", "rsam", "swa", "masksparsity", "squat", "distillation"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c.split()[-1] in SLOW)) for c in CASES])
def test_a_stage_gone_on_with_equals_an_undisturbed_one(case, bundle, tmp_path, monkeypatch, only_training):
    resumed_equals_undisturbed(CASES[case], bundle, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", ["train: sgd with momentum", "quantize: gaqat"])
def test_so_does_one_with_channels_last(case, bundle, tmp_path, monkeypatch, only_training):
    resumed_equals_undisturbed(CASES[case], bundle, tmp_path, monkeypatch, memory_format="channels_last")


def test_so_does_one_whose_images_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch, only_training):
    for i in range(60):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((20, 16), 10 + 60 * (i % 2)).convert("RGB")
        noise.save(tmp_path / "data" / "ab"[i % 2] / f"{i}.jpg")
    monkeypatch.setattr(reading, "MOST_BYTES", 0)
    bundle = data.load("folder", path=str(tmp_path / "data"), size=8, augment="domainbed", corruptions="none")
    assert bundle.train.on_disk and bundle.val.on_disk

    def dropping(classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    stages, given = [{"train": {"epochs": 3, "method": "sam"}}], {"batch_size": 10, "model": dropping}
    whole, _ = run(bundle, stages, tmp_path / "whole", monkeypatch, **given)
    steps = 3 * (len(bundle.train) // 10)
    assert steps == 12
    parts, cuts = run(bundle, stages, tmp_path / "parts", monkeypatch, [2, 7, 11], workers=2, **given)
    assert cuts == [2, 7, 11]
    expected, found = whole.model.state_dict(), parts.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def resumed_equals_undisturbed(stages, bundle, tmp_path, monkeypatch, **given):
    whole, _ = run(bundle, stages, tmp_path / "whole", monkeypatch, **given)
    steps = 3 * (len(bundle.train) // 128)
    wanted = [1, steps // 3, steps // 2, steps - 1]  # also the last step of an epoch, before its validation
    parts, cuts = run(bundle, stages, tmp_path / "parts", monkeypatch, wanted, **given)
    assert cuts == wanted
    expected, found = whole.model.state_dict(), parts.model.state_dict()
    assert list(expected) == list(found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert without_seconds(whole.ledger) == without_seconds(parts.ledger)
    assert whole.plan.to_json() == parts.plan.to_json()


def without_seconds(ledger):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in ledger]
