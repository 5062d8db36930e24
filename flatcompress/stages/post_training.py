"""Post-training quantization inside the quantize stage: whole, or as the start of a training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatcompress import quant
from flatcompress.quant import ptq
from flatcompress.registry import Registry
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import train_batches

CALIBRATION_SAMPLES = 512
TABLES: dict[str, Registry[Any]] = {  # key of the stage -> the table that its value is a row of
    "scaling": ptq.SCALINGS,
    "weight_scale": ptq.WEIGHT_SCALES,
    "calibrator": ptq.CALIBRATORS,
    "rounding": ptq.ROUNDINGS,
    "correction": ptq.CORRECTIONS,
}


def quantize(
    run: RunContext, images: list[Tensor], weight_bits: int, settings: dict[str, Any], max_drop: float | None
) -> None:
    """Quantize without training; a limit on the drop is measured on the validation split.

    It is in points of a share, in its own unit of any other metric.
    """
    if max_drop is None:
        start(run, images, weight_bits, settings)
    else:
        task = run.task

        def points(model: nn.Module) -> float:
            value = run.evaluate(model, run.data.val)[task.selects]
            return (100 if task.metric.share else 1) * (value if task.metric.higher else -value)

        done, rounds = quant.within_drop(run.model, images, points, max_drop, weight_bits, **settings)
        run.plan = run.plan + done.plan
        run.emit("post_training", **done.to_dict(), rounds=rounds)


def settings(run: RunContext, config: Any, placement: dict[str, Any]) -> dict[str, Any]:
    """What the recipe says to `quant.post_training`, beside the bits of the weights."""
    return {
        **placement,
        **{key: getattr(config, key) for key in TABLES},
        "method": config.quantizer,
        "per_channel": config.per_channel,
        "max_float_macs": config.max_float_macs,
        "example_input": run.example(),
        "seed": run.seed,
    }


def start(run: RunContext, images: list[Tensor], weight_bits: int, settings: dict[str, Any]) -> None:
    """Post-training quantization of ``run.model`` in place; the plan gains the quantizers."""
    done = quant.post_training(run.model, images, weight_bits, **settings)
    run.plan = run.plan + done.plan
    run.emit("post_training", **done.to_dict())


def calibration(run: RunContext, samples: int) -> list[Tensor]:
    """The images that ranges are taken from."""
    return [x for x, _ in train_batches(run, samples)]
