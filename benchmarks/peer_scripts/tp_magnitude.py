"""Torch-Pruning: coupled channels by magnitude, one shot to half of the MACs, then the plain optimizer."""

from __future__ import annotations

import argparse

# user code
import torch
import torch_pruning as tp
from torch import nn

# end
from benchmarks.peer_scripts.given import Given, run
from benchmarks.peer_scripts.loop import fit


# user code
def cut(model: nn.Module, given: Given) -> None:
    example = given.example
    pruner = tp.pruner.BasePruner(
        model.eval(), example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        pruning_ratio=0.9, max_pruning_ratio=0.9, iterative_steps=100, ignored_layers=[model.fc],
    )  # fmt: skip
    dense, _ = tp.utils.count_ops_and_params(model, example)
    while tp.utils.count_ops_and_params(model, example)[0] > 0.5 * dense:
        pruner.step()


def work(given: Given) -> None:
    model = given.model
    cut(model, given)
    fit(model, given, lr=given.options.lr, optimizer=given.options.optimizer)
    axes = {"x": {0: "batch"}}
    torch.onnx.export(model, (given.example,), given.onnx, dynamo=False, input_names=["x"], dynamic_axes=axes)


# end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=1.5e-3)


if __name__ == "__main__":
    run(work, arguments)
