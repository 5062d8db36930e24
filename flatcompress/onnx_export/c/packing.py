"""Which tensors of codes lie two to a byte in the arena: an option of profile ``c``, for activations of up to 4 bits.

A tensor can where everything that makes it and everything that reads it knows halves of bytes, and every code is
below 16. Vectors that linear kernels read where they lie stay bytes, as does what a move, a product of activations or a
row of real values touches.
"""

from __future__ import annotations

from collections import defaultdict

from flatcompress.onnx_export.c import choosing, ir

KERNELS = (choosing.CONV, choosing.DEPTHWISE, choosing.SPARSE)


def pack(program: ir.Program, kernels: dict[int, str]) -> None:
    """Set ``packed`` on every tensor that can be. kernels: of convolutions, by the number of their step."""
    views = _views(program)
    chosen = {name for name, tensors in views.items() if _fits(tensors)}
    for index, step in enumerate(program.steps):
        if not _knows(step, kernels.get(index)):
            chosen -= {tensor.name for tensor in _touched(step)}
    _pair_up(program, chosen)
    for name in chosen:
        for tensor in views[name]:
            tensor.packed = True


def _pair_up(program: ir.Program, chosen: set[str]) -> None:
    """Of a fused addition with odd channels both sides are packed, or none."""
    while True:
        apart: set[str] = set()
        for step in program.steps:
            if isinstance(step, ir.Conv) and step.add is not None and step.outputs % 2:
                pair = {step.out.name, step.add.other.name}
                apart |= pair & chosen if not pair <= chosen else set()
        if not apart:
            return
        chosen -= apart


def _touched(step: ir.Step) -> list[ir.Codes]:
    """Every tensor of codes that a step reads or makes; one tensor may be there as several objects."""
    found = [*step.sources, *(step.convolution.sources if step.convolution is not None else [])]
    found += [step.out] + ([step.add.other] if isinstance(step, ir.Conv) and step.add is not None else [])
    return [tensor for tensor in found if isinstance(tensor, ir.Codes)]


def _views(program: ir.Program) -> dict[str, list[ir.Codes]]:
    views = defaultdict(list)
    for step in program.steps:
        for tensor in _touched(step):
            views[tensor.name].append(tensor)
    return views


def _fits(views: list[ir.Codes]) -> bool:
    """Codes below 16, more channels than one, and pixels that begin with a byte however the tensor is looked at."""
    widths = {tensor.channels for tensor in views}
    alike = len(widths) == 1 or all(width % 2 == 0 for width in widths)
    return alike and min(widths) > 1 and max(tensor.high for tensor in views) < 16


def _knows(step: ir.Step, kernel: str | None) -> bool:
    if isinstance(step, ir.Conv):
        return kernel in KERNELS
    if isinstance(step, ir.Add | ir.Table):  # which go code by code, whatever a pixel is
        return step.out is not None and step.out.channels % 2 == 0
    return isinstance(step, ir.Quantize | ir.GlobalPool | ir.MaxPool | ir.Concat)
