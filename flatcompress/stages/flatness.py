"""The flatness-times-quantization map of a quantize stage: how far each layer may move, how far its grid moves it."""

from __future__ import annotations

from typing import Any

from torch import nn

from flatcompress import quant
from flatcompress.stages import budget
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import FULL, train_batches
from flatcompress.stages.reported import reported
from flatcompress.training import layout

RISE = 0.01  # of the loss: what a layer's reach is measured by


def log_map(run: RunContext, before: nn.Module, epochs: int) -> None:
    """One event with a row per quantized layer of ``run.model``; ``before`` is the float model that it was made from.

    It takes about as much memory as a training step of 32 samples, or of fewer where the stage's ``epochs`` are short.

    A model without second derivatives, or too large for them in this memory, is trained all the same, with a warning.
    """
    trained = epochs * len(run.data.train)
    samples = budget.sizes(run.measuring, trained, 1, FULL).map
    probes = budget.probes(run.measuring, trained, samples)
    x, y = train_batches(run, samples, samples)[0]
    bits = {name: layer.weight_spec().bits for name, layer in quant.quantized_layers(run.model).items()}

    def measured() -> list[dict[str, Any]]:
        with layout.lying(before, run.layout):
            return quant.flatness_map(
                before, lambda: run.task.loss(before(x), y), bits, RISE, probes, run.seed, budget.grids(probes)
            )

    with run.doing("how far each layer may move"):
        rows = reported(
            "the flatness map of the layers could not be measured", measured, None, " flatness_map: false skips it."
        )
    if rows is not None:
        run.emit("flatness", rise=RISE, samples=samples, probes=probes, layers=rows)
