"""Rows of two-bit weights as a stream of one to three bits a weight, decoded into the arena a few channels at a time.

After training half of a layer's two-bit weights are zeros and few are the lowest, so the commonest digit takes one bit,
the next one two, the others three. A layer of many pixels pays for the decoding once, because channels are then the
outer loop and pixels the inner one: its source has to stay whole, and pixels are gathered anew for each block of
channels. So it is done where a block fits into what the arena has free at that step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c import choosing, ir, weights
from flatcompress.onnx_export.c.plan import Plan, alive

if TYPE_CHECKING:
    from flatcompress.onnx_export.c.layers import Layer

PIXELS = 32  # fewer do not pay for the decoding
CHANNELS = 8  # of a block at least
LEAST = 400  # bytes that have to be saved: the decoder itself takes flash
CODES = ((1, 1), (2, 2), (4, 3), (0, 3))  # the bits of each rank, the first one in the lowest, and how many


def stream(found: weights.Digits, order: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The bytes of all rows, and two more for what is read ahead. order: the digits, the commonest first."""
    words = weights.rows(found, fill=int(order[0])).reshape(-1)
    places = np.array([[2 * step, 2 * step + 16] for step in range(8)], np.uint32).reshape(-1)
    rank = np.argsort(order)[(words[:, None] >> places) & 3].reshape(-1)
    patterns, lengths = np.array(CODES).T
    kept = ((patterns[rank][:, None] >> np.arange(3)) & 1)[np.arange(3) < lengths[rank][:, None]]
    return np.append(np.packbits(kept.astype(np.uint8), bitorder="little"), np.zeros(2, np.uint8))


def ranks(found: Iterable[weights.Digits]) -> NDArray[np.int64]:
    """The four digits, the commonest of all layers first."""
    counts = sum((np.bincount(one.values.reshape(-1), minlength=4) for one in found), np.zeros(4, np.int64))
    return np.argsort(-counts, kind="stable")


def pairs(order: NDArray[np.int64]) -> list[int]:
    """Of six bits, the two digits that they begin with, and over them how many bits these take."""
    table = []
    for ahead in range(64):
        first, taken = _next(ahead)
        second, more = _next(ahead >> taken)
        table.append(int(order[first]) | int(order[second]) << 2 | (taken + more) << 4)
    return table


def _next(ahead: int) -> tuple[int, int]:
    """The rank that bits begin with, and how many it takes."""
    return next((rank, size) for rank, (bits, size) in enumerate(CODES) if ahead & ((1 << size) - 1) == bits)


def choose(program: ir.Program, layers: dict[int, Layer], plan: Plan) -> bool:
    """Set ``block`` of the layers that are worth it; whether there are any. plan: without them."""
    order = ranks(layer.digits for layer in layers.values() if layer.digits.bits == 2)
    saved = 0
    for index, layer in layers.items():
        block = _block(program, index, layer, plan)
        less = weights.rows(layer.digits).nbytes - len(stream(layer.digits, order)) if block else 0
        if less > 0:
            layer.block = block
            layer.step.pixels = 1  # the source is needed until the last block is done
            saved += less
    if saved < LEAST:
        drop(layers)
    return saved >= LEAST


def drop(layers: dict[int, Layer]) -> None:
    """Rows of words again, everywhere."""
    for layer in layers.values():
        if layer.block:
            layer.block, layer.step.pixels = 0, 2


def _block(program: ir.Program, index: int, layer: Layer, plan: Plan) -> int:
    """How many channels' rows fit; 0 where that or the layer does not suit."""
    step = layer.step
    plain = layer.kernel == choosing.CONV and program.steps[index] is step and step.groups == 1
    if not plain or layer.digits.bits != 2 or step.height * step.width < PIXELS:
        return 0
    free = plan.arena - alive(program, index) - layer.scratch
    block = min(step.outputs, free // (layer.words // 2) // 2 * 2)
    return block if block >= min(CHANNELS, step.outputs) else 0
