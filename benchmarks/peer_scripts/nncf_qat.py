"""NNCF: 8-bit post-training initialisation, then training of the returned module, stripped for export."""

from __future__ import annotations

# user code
import nncf
import torch

# end
from benchmarks.peer_scripts.given import Given, run
from benchmarks.peer_scripts.loop import fit


# user code
def work(given: Given) -> None:
    calibration = nncf.Dataset(given.train, lambda batch: batch[0])
    model = nncf.quantize(given.model, calibration, subset_size=8)
    fit(model, given, lr=1e-3)
    model = nncf.strip(model, example_input=given.example)
    torch.onnx.export(
        model, (given.example,), given.onnx, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
    )


# end


if __name__ == "__main__":
    run(work)
