"""``quantize: {epochs: 0}``: post-training quantization as a stage, and as the start of a training."""

from __future__ import annotations

import json

import pytest
from small_runs import only_training, pipeline

from flatcompress import quant
from flatcompress.cli.debugging import debug_run
from flatcompress.errors import UserError
from flatcompress.recipe import parse_recipe


def recipe(**keys):
    return parse_recipe({"name": "x", "data": {"name": "rotated-digits"}, "stages": [{"quantize": keys}]})


def events(folder, name):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == name]


def test_without_epochs_nothing_is_trained_and_the_log_says_what_was_done(tmp_path, monkeypatch):
    only_training(monkeypatch)
    result = pipeline({"quantize": {"epochs": 0, "weight_bits": 4, "activation_bits": 8}}).run(tmp_path / "run")
    assert result.ledger[-1]["method"] == "post-training" and result.ledger[-1]["passes"] == 0
    (done,) = events(tmp_path / "run", "post_training")
    assert {row["name"] for row in done["layers"]} == set(quant.quantized_layers(result.model))
    assert done["settings"]["calibrator"] == "mse" and done["samples"]["calibration"] > 100


def test_a_training_may_start_from_post_training(tmp_path, monkeypatch):
    only_training(monkeypatch)
    keys = {"epochs": 1, "start": "post_training", "method": "lsq", "flatness_map": False}
    result = pipeline({"quantize": keys}).run(tmp_path / "run")
    assert result.ledger[-1]["passes"] > 0 and len(events(tmp_path / "run", "post_training")) == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"epochs": 0, "calibrator": "entropi"}, "entropy"),
        ({"epochs": 2, "rounding": "gptq"}, "epochs: 0"),
        ({"epochs": 0, "start": "lsq"}, "leave it out"),
        ({"epochs": 2, "max_drop": 1.0}, "epochs: 0"),
        ({"epochs": -1}, "greater than or equal to 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        recipe(**keys)


def test_a_recipe_with_every_default_written_out_is_read_again():
    for keys in ({"epochs": 0}, {"epochs": 2}, {"epochs": 2, "start": "post_training", "rounding": "gptq"}):
        once = recipe(**keys)
        assert parse_recipe(once.to_dict()).to_dict() == once.to_dict()


def test_debug_of_something_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="run folder"):
        debug_run(tmp_path, 8)


def test_what_may_stay_float_holds_without_training_too(tmp_path, monkeypatch):
    only_training(monkeypatch)
    asked = {}
    whole = quant.post_training
    monkeypatch.setattr(quant, "post_training", lambda *given, **keys: asked.update(keys) or whole(*given, **keys))
    pipeline({"quantize": {"epochs": 0, "max_float_macs": 0.25}}).run(tmp_path / "run")
    assert asked["max_float_macs"] == 0.25
