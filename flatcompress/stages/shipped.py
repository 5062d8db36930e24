"""The model as the quantize stage hands it on: with BatchNorm statistics estimated anew, by which epochs are judged,
and at the end with the scales and biases of its file.

Weights that swing around a rounding edge leave the running statistics behind (arXiv 2203.11086, section 4.3): judged
by those, an epoch can look useless that ships well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import onnx_export, quant
from flatcompress.errors import UserError
from flatcompress.modules import batchnorms
from flatcompress.sharded import is_divided
from flatcompress.stages import budget
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches

STATISTICS_BATCHES, FEWEST = 10, 2


def statistics_batches(run: RunContext, trained: int | None = None) -> list[Tensor]:
    """The inputs that BatchNorm's statistics are estimated on after QAT, on the model's device.

    trained: samples that the stage takes a gradient of, each as often as it does; of a short training there are fewer
    (`budget.deciding`). None: `STATISTICS_BATCHES` whatever was trained.
    """
    return [x for x, _ in train_batches(run, statistics_samples(run, trained))]


def statistics_samples(run: RunContext, trained: int | None) -> int:
    """How many samples those are."""
    most = STATISTICS_BATCHES * run.batch_size
    return most if trained is None else budget.deciding(most, trained, FEWEST * run.batch_size)


def estimate(run: RunContext, trained: int | None = None) -> None:
    """The quantized network's own BatchNorm statistics: the float network's no longer fit its activations."""
    with run.doing("BatchNorm statistics"):
        _estimate(run, statistics_batches(run, trained))


def _estimate(run: RunContext, batches: list[Tensor]) -> None:
    """`quant.reestimate_batchnorm`, or what it found the last time where the network and the batches were the same.

    The epoch that is selected was often judged last, and then has these statistics already.
    """
    norms = batchnorms(run.model)
    if is_divided(run.model):  # processes that see parts must not decide by them
        quant.reestimate_batchnorm(run.model, batches)
        return
    key = _fingerprint(run.model, batches)
    if run.statistics is not None and run.statistics[0] == key:
        for name, norm in norms.items():
            norm.load_state_dict(run.statistics[1][name])
        return
    quant.reestimate_batchnorm(run.model, batches)
    run.statistics = key, _statistics(norms)


def _statistics(norms: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}


def _fingerprint(model: nn.Module, batches: list[Tensor]) -> bytes:
    """A digest of everything that the statistics come from: weights, scales, which biases are rounded, the inputs."""
    found = {f"{name}.{key}" for name in batchnorms(model) for key in ("running_mean", "running_var")}
    rest = [value for name, value in model.state_dict().items() if name not in found and "num_batches" not in name]
    digest = hashlib.blake2b(bytes(bool(getattr(module, "enabled", False)) for module in model.modules()))
    for value in (*rest, *batches):
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.digest()


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
def as_shipped(run: RunContext, keep_statistics: bool, trained: int | None = None) -> Iterator[None]:
    """Inside, the model has the statistics that it ships with; ``keep_statistics``: those are the running ones.

    trained: as `statistics_batches` takes it.

    Nothing else changes, the random state included: training goes on as if nobody had looked.
    """
    if keep_statistics:
        yield
        return
    with torch.random.fork_rng(devices=[]):  # reading batches draws from it
        batches = statistics_batches(run, trained)
    norms = batchnorms(run.model)
    before = _statistics(norms)
    try:
        with run.part("BatchNorm statistics"):
            _estimate(run, batches)
        yield
    finally:
        for name, norm in norms.items():
            norm.load_state_dict(before[name])
