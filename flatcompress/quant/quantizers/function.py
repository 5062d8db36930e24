"""LSQ's forward and backward as autograd functions; the equations are those of `flatcompress.quant.quantizers.lsq`.

Lean: only v and Q(v) are kept, which the operators on both sides keep anyway. v/s and the range mask are computed again
in backward, from v against the range's ends and without a division: dQ/ds = (Q(v) - v * [inside]) / s. Keeping v/s and
the integers instead doubles the memory of an activation.

A rectifier in front (ReLU, ReLU6) is one function with the quantizer, `QuantizeWhole`: clipping and rounding both grow
with v, so clip(round(min(max(v, 0), h) / s)) = min(max(round(v / s), 0), round(h / s), Qp), and both masks are one.
What a ReLU6 takes in passes over memory, forward and backward, is saved, and its output is not kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

_LARGE, _PART = 1 << 20, 1 << 18  # numbers: above the first, tensors are worked through in parts of the second
_mask = torch.ops.aten.hardtanh_backward  # (t, v, low, high): t where low < v < high, else 0
_positive = torch.ops.aten.threshold_backward  # (t, v, 0): t where v > 0, else 0


class Quantize(torch.autograd.Function):
    """Q(v) with scales of any shape on any device: (v, scale that learns, step that acts, Qn, Qp, gradient scale)."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, qn: int, qp: int, g: float) -> Any:
        quantized = (v / step).round_().clamp_(-qn, qp).mul_(step)
        ctx.save_for_backward(v, quantized, step)
        ctx.range = qn, qp, g
        return quantized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        v, quantized, step = ctx.saved_tensors
        qn, qp, g = ctx.range
        # How far v lies inside the range; its sign is that of the comparisons. Five operators on floats take a third of
        # the time of two comparisons, their conjunction and two selections.
        inside, other = v - step * -qn, step * qp - v
        torch.minimum(inside, other, out=inside)
        grad_v = _positive.default(grad, inside, 0) if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            residual = _positive.grad_input(v, inside, 0, grad_input=other)
            torch.sub(quantized, residual, out=residual)
            grad_scale = _sum_per_scale(grad, residual, step).div_(step).mul_(g)
        return grad_v, grad_scale, None, None, None, None


class QuantizeWhole(torch.autograd.Function):
    """Q(v) with one scale on the processor, ``most`` None; else Q(min(max(v, 0), most)), which may be infinite."""

    @staticmethod
    def forward(
        ctx: Any, v: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, qn: int, qp: int, g: float,
        most: float | None = None,
    ) -> Any:  # fmt: skip
        low, high = -qn if most is None else 0, float(qp)
        if most is not None and most < math.inf:
            high = min(high, float(torch.full_like(step, most).div_(step).round_()))
        parts = in_parts(v)
        if parts is None:
            quantized = torch.div(v, step).round_().clamp_(low, high).mul_(step)
        else:
            quantized = torch.empty_like(v)
            for (part,), target in zip(parts, flat(quantized).split(_PART), strict=True):  # type: ignore[union-attr]
                torch.div(part, step, out=target).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(v, quantized, step)
        ctx.range = qn, qp, g, most
        return quantized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        v, quantized, step = ctx.saved_tensors
        qn, qp, g, most = ctx.range
        of = _Ends(step, qn, qp, most)
        parts = in_parts(v, grad, quantized) if all(ctx.needs_input_grad[:2]) else None
        if parts is not None:
            gradient, total = _backward_in_parts(v, parts, of)
            return gradient, total.view(step.shape).div_(step).mul_(g), None, None, None, None, None
        grad_v = _mask.default(grad, v, *of.passing) if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            residual = of.kept(v, torch.empty_like(v))
            torch.sub(quantized, residual, out=residual)
            grad_scale = _dot(grad, residual).view(step.shape).div_(step).mul_(g)
        return grad_v, grad_scale, None, None, None, None, None


class QuantizeTraced(torch.autograd.Function):
    """`Quantize` for a compiler, which joins operators by itself: nothing in place, and no look at numbers."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, qn: int, qp: int, g: float) -> Any:
        quantized = (v / step).round().clamp(-qn, qp) * step
        ctx.save_for_backward(v, quantized, step)
        ctx.range = qn, qp, g
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        v, quantized, step = ctx.saved_tensors
        qn, qp, g = ctx.range
        inside = (v > step * -qn) & (v < step * qp)
        residual = quantized - torch.where(inside, v, 0.0)
        grad_scale = (grad * residual).sum_to_size(step.shape) / step * g
        return torch.where(inside, grad, 0.0), grad_scale, None, None, None, None


class _Ends:
    """Between which ends the gradient passes, and what of v is left where the rounding's residual counts."""

    def __init__(self, step: torch.Tensor, qn: int, qp: int, most: float | None) -> None:
        self.low, self.high = 0.0 if most is not None else float(step * -qn), float(step * qp)
        self.most = self.high if most is None else min(most, self.high)

    @property
    def passing(self) -> tuple[float, float]:
        """Where the gradient of v passes."""
        return self.low, self.most

    def kept(self, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What the quantizer is given where that lies inside its range, else 0; into ``out``."""
        if self.most < self.high:  # the rectifier ends inside the grid
            return torch.clamp(v, self.low, self.most, out=out)
        return _mask.grad_input(v, v, self.low, self.high, grad_input=out)


def rectified(v: torch.Tensor, most: float | None = None) -> torch.Tensor:
    """v as the rectifier that ``most`` means leaves it: none, ReLU (infinite), ReLU6 (6)."""
    if most is None:
        return v
    return F.relu(v) if most == math.inf else F.hardtanh(v, 0.0, most)


def flat(t: torch.Tensor) -> torch.Tensor | None:
    """All values in the order of memory, as a view; None where they do not lie densely."""
    if t.is_contiguous():
        return t.view(-1)
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).view(-1)
    return None


def in_parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]] | None:
    """Large tensors that lie alike, in parts that fit a cache (a third of the time was memory's); else None."""
    first = tensors[0]
    if first.numel() <= _LARGE or any(t.stride() != first.stride() for t in tensors):
        return None
    views = [f for t in tensors if (f := flat(t)) is not None]
    return list(zip(*(f.split(_PART) for f in views), strict=True)) if len(views) == len(tensors) else None


def _backward_in_parts(
    v: torch.Tensor, parts: list[tuple[torch.Tensor, ...]], of: _Ends
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of v, and the sum of grad * residual, of (v, gradient, Q(v)) in parts."""
    grad_v, sums, scratch = torch.empty_like(v), [], v.new_empty(_PART)
    for (value, grad, quantized), out in zip(parts, flat(grad_v).split(_PART), strict=True):  # type: ignore[union-attr]
        _mask.grad_input(grad, value, *of.passing, grad_input=out)
        residual = of.kept(value, scratch[: len(value)])
        sums.append(torch.dot(grad, torch.sub(quantized, residual, out=residual)))
    return grad_v, torch.stack(sums).sum()


def _dot(grad: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    one, other = flat(grad), flat(residual)
    if one is None or other is None or grad.stride() != residual.stride():
        return torch.dot(grad.flatten(), residual.flatten())
    return torch.dot(one, other)


def _sum_per_scale(grad: torch.Tensor, residual: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """sum of grad * residual over the elements of each scale; overwrites residual."""
    if step.numel() == 1:
        return _dot(grad, residual).view(step.shape)
    product = residual.mul_(grad)
    if step.shape[0] == 1:  # scales along another dimension: transposed convolutions
        return product.sum_to_size(step.shape)
    return product.sum(tuple(range(1, product.dim())), keepdim=True)  # as flatten(1).sum(1), from fewer operators
