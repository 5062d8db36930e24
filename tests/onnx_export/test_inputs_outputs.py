"""Models with several inputs and outputs: the file has the model's names, types and open batch."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from conftest import toy_quantize
from onnx import numpy_helper
from torch import nn

from flatcompress.errors import UserError
from flatcompress.onnx_export import bench, certify, export, verify
from flatcompress.onnx_export.proof.evidence import read
from flatcompress.onnx_export.runtime.sessions import feed, kernels, session


class Two(nn.Module):
    """An image and a vector in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side, self.head = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, image, side):
        joined = torch.cat([self.conv(image).relu().mean((2, 3)), self.side(side).relu()], 1)
        return {"logits": self.head(joined), "features": joined}


class Tokens(nn.Module):
    """Token ids and a mask in, a pair out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids, mask):
        kept = self.table(ids) * mask.unsqueeze(-1)
        pooled = kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.head(pooled), mask


def same(path, model: nn.Module, batch: tuple[torch.Tensor, ...], results: list[torch.Tensor]) -> None:
    handle = session(path)
    found = handle.run(None, feed(handle, tuple(t.numpy() for t in batch)))
    for ours, theirs in zip(found, results, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_image_and_a_vector_in_and_a_dictionary_out(tmp_path):
    torch.manual_seed(0)
    model = Two().eval()
    example = {"image": torch.randn(2, 3, 8, 8), "side": torch.randn(2, 5)}
    exported = export(model, example, tmp_path / "m.onnx", "float32")
    handle = session(exported.path)
    assert [(i.name, i.shape[0]) for i in handle.get_inputs()] == [("image", "batch"), ("side", "batch")]
    assert [o.name for o in handle.get_outputs()] == ["logits", "features"]
    batch = (torch.randn(3, 3, 8, 8), torch.randn(3, 5))
    same(exported.path, model, batch, list(model(*batch).values()))


def test_token_ids_stay_whole_numbers_and_are_timed(tmp_path):
    torch.manual_seed(0)
    model = Tokens().eval()
    example = (torch.randint(0, 11, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
    exported = export(model, example, tmp_path / "m.onnx", "float32")
    assert [i.type for i in session(exported.path).get_inputs()] == ["tensor(int64)", "tensor(int64)"]
    batch = (torch.randint(0, 11, (5, 7)), torch.randint(0, 2, (5, 7)))
    same(exported.path, model, batch, list(model(*batch)))
    assert bench(exported.path, runs=1)["files"][0]["latency"]["1"]["median_ms"] > 0


def test_a_quantized_model_with_two_inputs_runs_on_integers(tmp_path):
    torch.manual_seed(0)
    model, example = Two(), (torch.randn(4, 3, 8, 8), torch.randn(4, 5))
    toy_quantize(model, example, bits=7, activation_bits=8)
    for layer in (model.conv, model.side, model.head):
        layer.bits = 7
    exported = export(model, example, tmp_path / "m.onnx", "int8")
    assert kernels(exported.path).integer >= 3
    same(exported.path, model, example, list(exported.reference(*example)))


def certified(folder, profile: str = "packed"):
    """A quantized model of two inputs and two outputs, its certificate, and what it was certified on."""
    torch.manual_seed(0)
    model, x = Two(), (torch.randn(24, 3, 8, 8), torch.randn(24, 5))
    toy_quantize(model, x, bits=7, activation_bits=8)
    for layer in (model.conv, model.side, model.head):
        layer.bits = 7
    exported = export(model, {"image": x[0][:2], "side": x[1][:2]}, folder / "model.onnx", profile)
    batches = [{"image": x[0][i : i + 16], "side": x[1][i : i + 16]} for i in (0, 16)]
    labels = model.eval()(*x)["logits"].argmax(1)
    return exported, certify(exported, batches, labels, model=model, latency_runs=0)


def test_a_model_with_two_inputs_is_certified_and_verified(tmp_path):
    exported, certificate = certified(tmp_path)
    assert certificate["holds"], certificate["failures"]
    assert certificate["parity"]["output"] == "logits" and certificate["metric"]["samples"] == 24
    assert certificate["outputs"]["features"]["largest_error_steps"] <= 1
    assert certificate["trained"]["file"]["largest_error_steps"] < 20
    kept = read(tmp_path / "evidence.safetensors")
    assert {n: v.shape for n, v in kept.inputs.items()} == {"image": (24, 3, 8, 8), "side": (24, 5)}
    result = verify(exported.path)
    assert result.holds, result.failures
    assert result.measured["accuracy"]["onnxruntime"] == certificate["metric"]["onnxruntime"]


def test_a_changed_file_of_two_inputs_is_found(tmp_path):
    exported, _ = certified(tmp_path, "int8")
    file = onnx.load(exported.path)
    weights = max(file.graph.initializer, key=lambda t: len(t.raw_data) * (t.data_type == onnx.TensorProto.INT8))
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights)[::-1].copy(), weights.name))
    onnx.save(file, exported.path)
    failures = verify(exported.path).failures
    assert any("not the one that was certified" in f for f in failures)
    assert any("steps from the reference" in f for f in failures)


def test_evidence_of_other_inputs_is_refused(tmp_path):
    exported, _ = certified(tmp_path)
    file = onnx.load(exported.path)
    for entry in file.graph.input:
        if entry.name == "side":
            entry.name = "other"
    for node in file.graph.node:
        node.input[:] = ["other" if name == "side" else name for name in node.input]
    onnx.save(file, exported.path)
    failures = verify(exported.path).failures
    assert any("image, other" in f and "image, side" in f for f in failures), failures


def test_token_ids_and_a_mask_are_certified_with_every_output(tmp_path):
    torch.manual_seed(0)
    model = Tokens().eval()
    batches = [(torch.randint(0, 11, (8, 7)), torch.randint(0, 2, (8, 7))) for _ in range(3)]
    exported = export(model, batches[0], tmp_path / "m.onnx", "float32")
    certificate = certify(exported, batches, model=model, latency_runs=0)
    assert certificate["holds"], certificate["failures"]
    assert certificate["parity"]["output"] == "output_0" and certificate["outputs"] == {"output_1": {"equal": 1.0}}
    assert json.loads((tmp_path / "certificate.json").read_text())["holds"]
    assert verify(exported.path).holds


def test_batches_that_are_not_the_files_inputs_are_refused(tmp_path):
    exported, _ = certified(tmp_path)
    with pytest.raises(UserError, match="image, side"):
        certify(exported, [torch.randn(4, 3, 8, 8)])
    with pytest.raises(UserError, match="4, 5 samples"):
        certify(exported, [(torch.randn(4, 3, 8, 8), torch.randn(5, 5))])
