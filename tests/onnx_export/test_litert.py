"""The LiteRT file: its integers are the reference's, in LiteRT's own interpreter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import randomize_norms
from torch import nn

from flatcompress import models, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, check_target, export, lower, verify
from flatcompress.onnx_export.litert import flat, model, values
from flatcompress.onnx_export.lower.integer import Grid
from flatcompress.onnx_export.proof import parity

SHAPE = (1, 16, 16)


FEW = "LiteRT's softmax puts a value at an edge into the next code, and of few bits a code is several output steps"


def drawn(shape: tuple[int, ...], count: int = 32) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def quantized(net: nn.Module, x: torch.Tensor, weight: int, activation: int, **options) -> nn.Module:
    randomize_norms(net)
    quant.quantize(net, weight_bits=weight, activation_bits=activation, example_input=x[:2], **options)
    quant.calibrate(net, [x])
    return net.eval()


def built(name: str, weight: int, activation: int) -> tuple[nn.Module, torch.Tensor]:
    options = {"vit_tiny": {"depth": 1}, "mobilenet_v2": {"width": 0.35}}.get(name, {})
    x = drawn(SHAPE)
    net = models.build(name, num_classes=10, input_shape=SHAPE, seed=0, **options)
    return quantized(net, x, weight, activation), x


def compared(net: nn.Module, x: torch.Tensor, path, profile: str = "litert", **options) -> dict:
    exported = export(net, x[:2], path, profile)
    expected = parity.reference_outputs(exported.reference, [x])
    found, _ = model.run(exported.litert.path, ["input"], [(x.numpy(),)], **options)
    return {**parity.compare(expected, found, parity.output_step(expected)), **exported.litert.figures}


# --- without the interpreter --------------------------------------------------------------------------------------


GRIDS = [(low, zero, high) for low in (0, 3, 112) for zero in (0, 3, 120, 128) for high in (15, 127, 135, 255)
         if low <= high]  # fmt: skip


@pytest.mark.parametrize(("low", "zero", "high"), GRIDS)
def test_every_code_of_a_grid_has_its_place_in_int8_and_no_other_is_reached(low, zero, high):
    where = values.place(Grid(0.1, zero, low, high, 8))
    assert -128 <= where.zero <= 127
    reached = np.arange(-400, 400) - where.shift  # what a sum would be stored as
    kept = reached.clip(-128, 127)
    kept = np.maximum(kept, where.zero) if where.relu else kept
    kept = np.maximum(kept, where.floor) if where.floor is not None else kept
    kept = np.minimum(kept, where.ceiling) if where.ceiling is not None else kept
    assert (kept + where.shift == np.arange(-400, 400).clip(low, high)).all()


def test_two_values_of_four_bits_share_a_byte_and_an_odd_one_has_its_own():
    assert flat.packed(np.array([1, -8, 7])) == bytes([0x81, 0x07])


def test_without_ai_edge_litert_the_profile_says_what_to_install(tmp_path, monkeypatch):
    net, x = built("resnet8", 8, 8)
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(UserError, match=r"pip install 'flatcompress\[litert\]'"):
        export(net, x[:2], tmp_path / "m.onnx", "litert")
    assert list(tmp_path.iterdir()) == []


# --- in LiteRT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [("resnet8", 4, 4), ("ds_cnn", 8, 8), ("vit_tiny", 8, 8),
     *(pytest.param(n, w, a, marks=pytest.mark.slow) for n in ("resnet8", "ds_cnn", "vit_tiny", "mobilenet_v2")
       for w, a in ((8, 8), (3, 8), (4, 4), (2, 2)) if n != "vit_tiny" or a == 8),
     *(pytest.param("vit_tiny", bits, bits, marks=[pytest.mark.slow, pytest.mark.xfail(strict=True, reason=FEW)])
       for bits in (4, 2))],
)  # fmt: skip
def test_litert_computes_what_the_reference_does(name, weight, activation, tmp_path):
    pytest.importorskip("ai_edge_litert")
    net, x = built(name, weight, activation)
    found = compared(net, x, tmp_path / "m.onnx")
    assert found["largest_error_steps"] <= 1.5 and found["equal_argmax"] == 1.0
    assert found["not_integer"] == [] or name == "vit_tiny"


@pytest.mark.slow
def test_a_transformer_of_few_bits_is_beyond_what_is_allowed_and_the_certificate_says_it(tmp_path):
    pytest.importorskip("ai_edge_litert")
    net, x = built("vit_tiny", 4, 4)
    found = certify(export(net, x[:2], tmp_path / "m.onnx", "litert"), [x], latency_runs=0)
    assert found["holds"] is False and all(sentence.startswith("LiteRT: ") for sentence in found["failures"])


class Mixed(nn.Module):
    """What the built-in networks lack: unequal paddings, groups, dilation, pooling, parts and joined channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, (3, 5), stride=(2, 1), padding=(0, 2))
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.wider = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(16, 16, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.out = nn.Linear(16 * 5 * 7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        a = torch.relu(self.grouped(x))
        x = self.wider(torch.cat([a, x], 1)[:, :8])
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.out(self.pool(torch.relu(x)).flatten(1))


class Series(nn.Module):
    """Convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.out = nn.Linear(8 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize(("make", "shape"), [(Mixed, (2, 19, 14)), (Series, (3, 32))])
def test_paddings_groups_parts_and_series_keep_their_values(make, shape, tmp_path):
    pytest.importorskip("ai_edge_litert")
    torch.manual_seed(0)
    net, x = make(), drawn(shape)
    found = compared(quantized(net, x, 8, 8), x, tmp_path / "m.onnx")
    assert found["largest_error_steps"] <= 1.5 and found["mean_error_steps"] < 0.1


def test_weights_of_four_bits_stay_four_bits_where_their_biases_allow_it(tmp_path):
    pytest.importorskip("ai_edge_litert")
    net, x = built("resnet8", 4, 8)
    wide = compared(copy.deepcopy(net), x, tmp_path / "a.onnx")
    narrow = compared(net, x, tmp_path / "b.onnx", "litert_int4")
    assert "int4" in narrow["layers"].values() and set(wide["layers"].values()) == {"int8"}
    saved = sum(w.size for w in (p.detach().numpy() for n, p in net.named_parameters() if n.endswith("weight"))) / 8
    assert narrow["bytes"] < wide["bytes"] - saved / 2
    assert narrow["equal_argmax"] >= 0.9


def test_the_certificate_holds_the_litert_file_and_verify_finds_a_changed_one(tmp_path):
    pytest.importorskip("ai_edge_litert")
    net, x = built("ds_cnn", 8, 8)
    exported = export(net, x[:2], tmp_path / "m.onnx", "litert", metadata={"note": "kept"})
    certificate = certify(exported, [x[:20], x[20:]], latency_runs=0, evaluations=16)
    assert certificate["holds"] and certificate["litert"]["xnnpack"]["flips"] == 0
    assert check_target(exported, [x], "litert")["run"]["integer_layers"] == len(exported.layers)
    assert model.described(exported.litert.path)["inputs"] == {"input": "NHWC"}
    assert verify(tmp_path / "m.onnx").holds
    data = bytearray(exported.litert.path.read_bytes())
    data[len(data) // 2] ^= 1
    exported.litert.path.write_bytes(bytes(data))
    assert "LiteRT file" in " ".join(verify(tmp_path / "m.onnx").failures)


def test_an_operator_without_a_form_is_refused_by_its_module_s_name(tmp_path):
    pytest.importorskip("ai_edge_litert")

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(self.fc(x), 1)

    x = drawn((8,))
    with pytest.raises(UserError, match=r"cumsum.*profile 'litert'"):
        export(quantized(Sorted(), x, 8, 8), x[:2], tmp_path / "m.onnx", "litert")
    assert list(tmp_path.iterdir()) == []
    assert lower(Sorted().eval(), x[:2]) is not None
