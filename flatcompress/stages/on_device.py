"""Budgets of flash and RAM of a quantize stage: what is known before training, and what a choice of bits costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.latency import device
from flatcompress.quant.sensitivity import CHOICES
from flatcompress.stages.quantize_config import QuantizeConfig


def check(model: nn.Module, example: Tensor, config: QuantizeConfig, settings: dict[str, Any]) -> None:
    """UserError where the float ``model``, quantized with ``settings``, cannot meet the stage's flash or ram.

    Flash is taken with the fewest bits that a layer may get, RAM as the stage's bits have it: they hardly change it.
    """
    limits = {unit: most for unit in ("flash", "ram") if (most := getattr(config, unit)) is not None}
    if not limits:
        return
    bits = config.bits if isinstance(config.bits, dict) else None
    width = min(CHOICES) if config.bits == "auto" else config.weight_bits
    found = device.measured(device.decided(model, example, weight_bits=width, bits=bits, **settings))
    over = {unit: found[unit] for unit, most in limits.items() if found[unit] > most}
    if over:
        asked = " and ".join(f"{unit} {limits[unit]:,.0f}" for unit in over)
        keys = ", ".join(f"{unit}: {limits[unit]:.0f}" for unit in over)
        raise UserError(
            f"{asked} cannot be met: with {width} bits in every layer that is free the C takes {device.written(over)}. "
            f"Cut channels in a stage before (prune: {{{keys}}}), lower first_last_bits, or raise it."
        )
