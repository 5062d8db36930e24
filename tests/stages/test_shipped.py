"""Epochs of QAT are judged on the model as it ships, and judging them changes nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from stage_pieces import config, context

from flatcompress import quant
from flatcompress.stages import run_stage, shipped
from flatcompress.training.batches import evaluate

KEYS = {"method": "lsq", "weight_bits": 3, "activation_bits": 3, "epochs": 3, "flatness_map": False}


def quantized(**keys):
    """The model after the stage, and the accuracy that each epoch and the selection were given."""
    work = context()
    seen = []
    work.emit = lambda event, **fields: seen.append((event, fields.get("val_accuracy")))
    run_stage("quantize", work, config("quantize", **{**KEYS, **keys}))
    return work, [value for event, value in seen if event == "epoch"], [v for event, v in seen if event == "selected"]


@pytest.mark.parametrize("averaging", ["none", "swa"])
def test_the_number_that_selects_is_that_of_the_model_as_shipped(averaging):
    work, _, selected = quantized(averaging=averaging, tie_free=False)  # moves scales after the selection
    assert selected == [evaluate(work.model, work.data.val, work.task)["accuracy"]]


@pytest.mark.parametrize("keys", [{"select": "last"}, {"averaging": "swad"}], ids=str)
def test_judging_an_epoch_changes_nothing(keys, monkeypatch):
    work, judged, _ = quantized(**keys)
    state = torch.random.get_rng_state()
    monkeypatch.setattr(shipped, "as_shipped", lambda *given: nullcontext())
    other, running, _ = quantized(**keys)
    assert judged != running  # the running statistics tell another story
    assert torch.equal(torch.random.get_rng_state(), state)
    if "select" in keys:  # SWAD's valley is chosen by what is judged
        ours, theirs = work.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_frozen_statistics_are_judged_as_they_are():
    work = context()
    before = {name: value.clone() for name, value in work.model.named_buffers()}
    with shipped.as_shipped(work, keep_statistics=True):
        assert all(torch.equal(value, before[name]) for name, value in work.model.named_buffers())
    with shipped.as_shipped(work, keep_statistics=False):
        assert any(not torch.equal(value, before[name]) for name, value in work.model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in work.model.named_buffers())


def test_scales_are_moved_at_the_end_by_less_than_a_thousandth_and_nothing_else_is():
    ours, theirs = (quantized(tie_free=tie_free)[0].model.state_dict() for tie_free in (True, False))
    moved = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert moved and all(name.endswith((".scale", ".initial")) for name in moved)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1.001 / 1024, atol=0) for name in moved)


def test_statistics_of_the_epoch_that_was_judged_last_are_not_estimated_again(monkeypatch):
    counted = []
    real = quant.reestimate_batchnorm
    monkeypatch.setattr(quant, "reestimate_batchnorm", lambda *given: (counted.append(1), real(*given)))
    work, judged, _ = quantized(select="last")
    assert len(counted) == len(judged) == 3
    monkeypatch.setattr(shipped, "_fingerprint", lambda *given: object())
    other, _, _ = quantized(select="last")
    assert len(counted) == 3 + 4
    ours, theirs = work.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_short_training_takes_fewer_samples_for_scales_and_statistics_and_says_so():
    work, said = context(batch_size=16), []
    work.emit = lambda event, **fields: said.append(fields) if event == "sampled" and "what" in fields else None
    n = len(work.data.train)
    run_stage("quantize", work, config("quantize", **{**KEYS, "epochs": 1}))
    assert [(f["what"], f["of_samples"]) for f in said[:2]] == [("calibration", n), ("statistics", min(160, n))]
    assert [f["samples"] for f in said[:2]] == [max(16, 3 * n // 8), max(32, 3 * n // 8)]
    assert len(torch.cat(shipped.statistics_batches(work, n))) == said[1]["samples"]
    said.clear()
    run_stage("quantize", context(emit=work.emit), config("quantize", **KEYS, freeze_bn=True, start="post_training"))
    assert not any(f["what"] in ("calibration", "statistics") for f in said)


@pytest.mark.parametrize("change", ["weight", "scale", "rounding", "data"])
def test_whatever_statistics_come_from_has_them_estimated_again(change, monkeypatch):
    work, _, _ = quantized(epochs=1)
    counted = []
    real = quant.reestimate_batchnorm
    monkeypatch.setattr(quant, "reestimate_batchnorm", lambda *given: (counted.append(1), real(*given)))
    work.statistics = None
    shipped.estimate(work)
    shipped.estimate(work)
    assert len(counted) == 1
    with torch.no_grad():
        if change == "weight":
            next(iter(quant.quantized_layers(work.model).values())).weight[0].mul_(1.01)
        elif change == "scale":
            next(iter(quant.scale_parameters(work.model).values())).mul_(1.01)
        elif change == "rounding":
            quant.set_bias_rounding(work.model, False)
        else:
            monkeypatch.setattr(shipped, "STATISTICS_BATCHES", 1)
    shipped.estimate(work)
    assert len(counted) == 2
