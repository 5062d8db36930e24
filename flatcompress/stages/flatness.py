"""The flatness-times-quantization map of a quantize stage: how far each layer may move, how far its grid moves it."""

from __future__ import annotations

from typing import Any

from torch import nn

from flatcompress import quant
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches
from flatcompress.stages.reported import reported

SAMPLES = 32  # about as much memory as a training step, and the time of a few
PROBES = 4
RISE = 0.01  # of the loss: what a layer's reach is measured by


def log_map(run: RunContext, before: nn.Module) -> None:
    """One event with a row per quantized layer of ``run.model``; ``before`` is the float model that it was made from.

    A model without second derivatives, or too large for them in this memory, is trained all the same, with a warning.
    """
    x, y = train_batches(run, SAMPLES, SAMPLES)[0]
    bits = {name: layer.weight_spec().bits for name, layer in quant.quantized_layers(run.model).items()}

    def measured() -> list[dict[str, Any]]:
        return quant.flatness_map(before, lambda: run.task.loss(before(x), y), bits, RISE, PROBES, seed=run.seed)

    rows = reported(
        "the flatness map of the layers could not be measured", measured, None, " flatness_map: false skips it."
    )
    if rows is not None:
        run.emit("flatness", rise=RISE, layers=rows)
