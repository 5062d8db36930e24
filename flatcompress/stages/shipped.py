"""The model as the quantize stage hands it on: with BatchNorm statistics estimated anew, by which epochs are judged,
and at the end with the scales and biases of its file.

Weights that swing around a rounding edge leave the running statistics behind (arXiv 2203.11086, section 4.3): judged
by those, an epoch can look useless that ships well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import onnx_export, quant
from flatcompress.errors import UserError
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches

STATISTICS_BATCHES = 10


def statistics_batches(run: RunContext) -> list[Tensor]:
    """The inputs that BatchNorm's statistics are estimated on after QAT, on the model's device."""
    return [x for x, _ in train_batches(run, STATISTICS_BATCHES * run.batch_size)]


def estimate(run: RunContext) -> None:
    """The quantized network's own BatchNorm statistics: the float network's no longer fit its activations."""
    with run.doing("BatchNorm statistics"):
        quant.reestimate_batchnorm(run.model, statistics_batches(run))


def settle(run: RunContext, tie_free: bool, *networks: nn.Module) -> None:
    """``networks`` (default: the run's) as their files compute: rounded biases, and scales at which no sum ties."""
    for network in networks or (run.model,):
        if tie_free:
            with run.doing("scales without ties"):
                run.emit("tie_free", **_untied(network, run.example()))
        quant.set_bias_rounding(network, True)


def _untied(network: nn.Module, example: Any) -> dict[str, Any]:
    try:
        return onnx_export.untie(network, example).to_dict()
    except UserError as problem:  # a network that has no file still trains
        return {"moved": 0, "left": {"all": str(problem)}}


@contextmanager
def as_shipped(run: RunContext, keep_statistics: bool) -> Iterator[None]:
    """Inside, the model has the statistics that it ships with; ``keep_statistics``: those are the running ones.

    Nothing else changes, the random state included: training goes on as if nobody had looked.
    """
    if keep_statistics:
        yield
        return
    with torch.random.fork_rng(devices=[]):  # reading batches draws from it
        batches = statistics_batches(run)
    with quant.reestimated(run.model, batches):
        yield
