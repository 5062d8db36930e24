"""Parity step by step: a code that rounding moves is carried on, a wrong step is named."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from flatcompress import quant
from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.proof import judging
from flatcompress.onnx_export.proof.parity import output_step, reference_outputs
from flatcompress.onnx_export.proof.samples import Samples
from flatcompress.onnx_export.proof.stepwise import stepwise


class Normed(nn.Module):
    """Convolutions with real arithmetic between their codes: a layer norm and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 6, 6])
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).softmax(1))
        return self.head(x.relu().mean((2, 3)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(12, 3, 6, 6)
    quant.quantize(model, 8, 8, example_input=x)
    quant.calibrate(model, [x])
    exported = export(model.eval(), x, tmp_path_factory.mktemp("steps") / "model.onnx", "int8")
    return exported, x


def steps(exported, x):
    inputs = Samples(exported.reference, [x])
    return stepwise(exported, inputs, 0, output_step(reference_outputs(exported.reference, inputs.batches)))


def changed(exported, path, change):
    """The same export with one stored tensor of its file changed."""
    model = onnx.load(exported.path)
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.raw_data) > 100]
    value = numpy_helper.to_array(weights[-1]).copy()
    weights[-1].CopyFrom(numpy_helper.from_array(change(value), weights[-1].name))
    onnx.save(model, path)
    return dataclasses.replace(exported, path=path)


def test_a_right_file_is_right_at_every_step(made):
    found = steps(*made)
    assert found["holds"] and found["wrong"] == [] and found["codes"] > 1000 and found["samples"] == 8


def test_a_wrong_step_is_found_and_named(made, tmp_path):
    exported, x = made
    found = steps(changed(exported, tmp_path / "m.onnx", lambda w: w[::-1]), x)
    assert not found["holds"]
    assert [row["name"] for row in found["wrong"]] == ["second"]


def test_one_changed_weight_does_not_hold(made, tmp_path):
    exported, x = made

    def one(w):
        w.reshape(-1)[5] = -120 if w.reshape(-1)[5] > 0 else 120
        return w

    wrong = changed(exported, tmp_path / "m.onnx", one)
    assert not steps(wrong, x)["holds"]
    assert not certify(wrong, [x], latency_runs=0, write=False)["holds"]


def test_a_far_output_is_allowed_only_with_every_step_proved():
    row = {"largest_error_steps": 3.0, "roundoff_steps": 1.0, "decisive": 0, "decisions": 9, "bit_equal": 0.0}
    assert any("3.0 steps" in reason for reason in judging.failures(row, row))
    assert judging.failures(row, row, {"holds": True, "wrong": []}) == []
    assert judging.failures(row, row, {"holds": False, "wrong": [{"name": "conv", "codes": 3}]})
    assert judging.failures({**row, "largest_error_steps": 5.5}, row, {"holds": True, "wrong": []})
