"""What is only reported costs no run: a measurement that fails leaves a gap and a warning."""

from __future__ import annotations

import json

import pytest
import torch
from stage_pieces import context

from flatcompress import Pipeline, report
from flatcompress.data import preview
from flatcompress.errors import Interrupted
from flatcompress.stages import export, flatness, measure
from flatcompress.stages.context import RunContext
from flatcompress.stages.reported import reported


def broken(*_args, **_keys):
    raise RuntimeError("derivative for this operator is not implemented.\nmore lines")


def test_a_failed_measurement_is_a_warning_in_one_line() -> None:
    with pytest.warns(
        UserWarning, match=r"^it could not be measured: derivative for this operator is not impl"
    ) as seen:
        assert reported("it could not be measured", broken, 7) == 7
    assert str(seen[0].message).endswith("implemented.")


@pytest.mark.parametrize("error", [Interrupted("stop"), OSError("disk full")])
def test_a_wish_to_stop_and_what_is_called_fatal_go_through(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        reported("x", fail, None, fatal=(OSError,))


@pytest.mark.parametrize("name", ["sharpness", "layer_sharpness", "layer_rows", "evaluate"])
def test_a_row_of_the_ledger_has_a_gap_where_a_measurement_failed(name: str, monkeypatch) -> None:
    monkeypatch.setattr(RunContext if name == "evaluate" else measure, name, broken)
    with pytest.warns(UserWarning, match="could not be|not implemented"):
        row = measure.measure(context(), "train", "sam", 1.0, 2)
    assert row["params"] > 0 and row["stage"] == "train"
    if name == "evaluate":
        assert row["accuracy"] == {"test": None, "held_out": None, "corrupted": None}


@pytest.mark.slow
def test_a_run_ends_in_its_file_whatever_is_reported_about_it(tmp_path, monkeypatch) -> None:
    for where, name in ((measure, "sharpness"), (measure, "layer_rows"), (export, "beside_float"), (report, "build")):
        monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr(flatness.quant, "flatness_map", broken)
    monkeypatch.setattr(preview, "sheet", broken)
    y = torch.arange(64) % 4
    data = {"train": (torch.randn(64, 3, 8, 8), y), "test": (torch.randn(16, 3, 8, 8), y[:16])}
    stages = [{"quantize": {"epochs": 1}}, {"export": {}}]
    result = Pipeline(model={"name": "resnet8", "width": 4}, data=data, stages=stages, batch_size=16).run(tmp_path)
    assert result.certificate is not None and result.certificate["holds"] and result.report is None
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    said = " ".join(e["message"] for e in events if e["event"] == "warning")
    for what in ("sharpness", "flatness map", "preview", "table of layers", "float model's", "report"):
        assert what in said, what
