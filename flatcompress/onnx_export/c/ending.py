"""How sums end as codes: a shift, the clamp to a byte, and bits that go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatcompress.onnx_export.c.layers import Layer


@dataclass
class Clamp:
    """How a rule ends: sums are raised by some bits, then come ``shift``, the clamp to a byte, and ``trim`` bits go;
    ``limits``: the grid's limits have to follow."""

    shift: int
    trim: int = 0
    raised: int = 0
    limits: bool = False


def clamp(low: int, high: int, shift: int, least: int = 0, room: int = 0) -> Clamp:
    """Of a rule that shifts by ``shift`` and ends at ``low`` and ``high``. least: what it must shift by at least; room:
    by how many bits its sums may be raised for that."""
    bits = (high + 1).bit_length() - 1
    trim = 8 - bits if low == 0 and high + 1 == 1 << bits else 0
    lacking = max(0, max(trim, least) - shift)
    if lacking > room:
        lacking, trim = 0, 0
    return Clamp(shift + lacking - trim, trim, lacking, limits=(low, high) != (0, (256 >> trim) - 1))


def end_of(layer: Layer) -> Clamp:
    """How a layer's rule ends; an offset without a lower word needs a shift of 33 bits."""
    result = layer.result
    if result is None:
        return Clamp(0)
    if layer.rule.floats:  # codes are raised themselves
        end = clamp(result.low, result.high, 0, room=0 if layer.far else 8)
        return Clamp(0, end.trim, 0, end.limits)
    end = clamp(result.low, result.high, layer.rule.shift - 32, 1, layer.room)
    return end if layer.even is None else replace(end, shift=end.shift + layer.even, raised=end.raised + layer.even)


def even_out(layers: Iterable[Layer]) -> None:
    """Set ``even`` of all layers whose sums become codes where they can end alike: a shift and a clamp of constant
    numbers of bits are one instruction. Sums are raised until all are shifted by what one of them needs."""
    coded = [layer for layer in layers if layer.result is not None and not layer.rule.floats]
    ends = [end_of(layer) for layer in coded]
    most = max((end.shift for end in ends), default=0)
    fits = [end.raised + most - end.shift <= layer.room for layer, end in zip(coded, ends)]
    if len({end.trim for end in ends}) == 1 and all(fits) and not any(end.limits for end in ends):
        for layer, end in zip(coded, ends):
            layer.even = most - end.shift
