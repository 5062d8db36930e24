"""Averaging in the train stage: every kind ends in a usable model, and resumes."""

from __future__ import annotations

import pytest
from tiny import recipe, write

from flatcompress import Pipeline


@pytest.mark.parametrize("kind", ["ema", "swa", "swad"])
def test_average_is_the_stage_result(kind: str, tmp_path):
    raw = recipe(stages=[{"train": {"method": "none", "epochs": 4, "averaging": kind, "optimizer": {"lr": 0.01}}}])
    raw["data"]["corruptions"] = "none"
    result = Pipeline.from_yaml(write(tmp_path, raw)).run()
    assert result.ledger[0]["accuracy"]["test"] > 0.5
