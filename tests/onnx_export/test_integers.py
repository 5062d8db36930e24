"""The certificate's two verdicts: what is proved, and what runs on integers."""

from __future__ import annotations

import pytest
import torch
from conftest import toy_quantize
from torch import nn

from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.proof import integers


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A network whose middle convolution stays in floats, exported; and its inputs."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*parts, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    toy_quantize(model, x, bits=6)
    model[0].bits = model[8].bits = 6
    model[2].__class__ = nn.Conv2d
    return export(model, x, tmp_path_factory.mktemp("mixed") / "m.onnx", "int8"), x, model


def test_a_layer_in_floats_is_a_warning_with_its_share(mixed):
    exported, x, model = mixed
    found = certify(exported, [x], model=model, latency_runs=0, write=False, integer_time=True)
    assert found["holds"], found["failures"]
    part = found["integer"]
    assert part["holds"] is False and (part["integer_layers"], part["layers"]) == (3, 4)
    (row,) = part["floats"]
    assert row["name"] == "2" and row["share_of_weights"] == pytest.approx(576 / (216 + 576 + 64 + 32))
    macs = {"0": 216 * 64, "2": 576 * 64, "4": 64 * 64, "8": 32}
    assert part["share_of_macs"] == pytest.approx(1 - macs["2"] / sum(macs.values()))
    assert 0 < part["share_of_time"] < 1
    assert "1 of 4 layers compute in floats" in found["warnings"][0]
    assert found["trained"]["file"]["largest_error_steps"] < 2


def test_it_is_a_failure_where_integers_are_required(mixed):
    exported, x, _ = mixed
    found = certify(exported, [x], latency_runs=0, write=False, require_integer=True)
    assert not found["holds"] and "require_integer: 1 of 4 layers" in found["failures"][0] and not found["warnings"]


def test_work_is_counted_for_products_and_recurrent_layers_too(tmp_path):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            y = self.inner(x)[0]
            return self.outer(y @ y.transpose(1, 2) @ y)[:, -1]

    exported = export(Attention().eval(), torch.randn(2, 5, 4), tmp_path / "m.onnx", "float32")
    found = {work.name: (work.weights, work.macs) for work in integers.works(exported.reference)}
    assert list(found.values()) == [(240, 1200), (0, 150), (0, 150), (18, 90)]
