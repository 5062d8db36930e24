"""How weights are rounded once their scales stand: to nearest, or so that the layer's or block's output is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatcompress.quant.ptq.reconstruct import Schedule
from flatcompress.registry import Registry

ROUNDINGS = Registry("rounding")


@dataclass(frozen=True)
class Rounding:
    """``by``: what is rounded at once (nothing, a layer by its Hessian, a layer or a block by gradients)."""

    by: str
    schedule: Schedule = field(default_factory=Schedule)


def nearest() -> Rounding:
    """Every weight by itself."""
    return Rounding("nothing")


def gptq() -> Rounding:
    """Column by column, in closed form."""
    return Rounding("hessian")


def adaround(steps: int = 200, lr: float = 2e-2) -> Rounding:
    """Up or down is learned, a layer at a time; activation scales stay."""
    return Rounding("layer", Schedule(steps=steps, lr=lr, scale_lr=0.0))


def brecq(steps: int = 200, lr: float = 2e-2) -> Rounding:
    """Up or down is learned, a block at a time, with the activation scales."""
    return Rounding("block", Schedule(steps=steps, lr=lr))


def qdrop(steps: int = 200, lr: float = 2e-2) -> Rounding:
    """As brecq, half of the activations left unquantized at random while learning."""
    return Rounding("block", Schedule(steps=steps, lr=lr, drop=0.5))


ROUNDINGS.add("nearest", nearest, "round to nearest")
ROUNDINGS.add("gptq", gptq, "error made up for by the weights still to come", "2210.17323")
ROUNDINGS.add("adaround", adaround, "up or down learned, layer by layer", "2004.10568")
ROUNDINGS.add("brecq", brecq, "up or down learned, block by block", "2102.05426")
ROUNDINGS.add("qdrop", qdrop, "brecq with activations dropped", "2203.05740")
