"""Models with several inputs and outputs: the file has the model's names, types and open batch."""

from __future__ import annotations

import numpy as np
import torch
from conftest import toy_quantize
from torch import nn

from flatcompress.onnx_export import bench, export
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
