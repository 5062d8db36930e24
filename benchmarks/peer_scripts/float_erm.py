"""The common start: the float network, plain optimizer, exported as it is."""

from __future__ import annotations

# user code
import torch
from safetensors.torch import save_file

# end
from benchmarks.peer_scripts.given import Given, run
from benchmarks.peer_scripts.loop import fit


# user code
def work(given: Given) -> None:
    fit(given.model, given, lr=3e-3)
    save_file(given.model.state_dict(), given.out / "start.safetensors")
    axes = {"x": {0: "batch"}}
    torch.onnx.export(
        given.model.eval(), (given.example,), given.onnx, dynamo=False, input_names=["x"], dynamic_axes=axes
    )


# end


if __name__ == "__main__":
    run(work)
