"""Two relatives of LSQ: LSQ+ (an offset for activations that go a little below zero) and PACT (a clipping level)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flatcompress.graph import ActivationSpec
from flatcompress.quant.quantizers.function import rectified
from flatcompress.quant.quantizers.lsq import Observer, StepQuantizer, grid


def three_sigma(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """LSQ+'s start of a weight scale, max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1), per row of [scales, elements].

    >>> three_sigma(torch.tensor([[-0.1, 0.3]]), bits=4)  # mu 0.1, sigma 0.2
    tensor([0.0875])
    """
    mu, sigma = rows.mean(1), rows.std(1, unbiased=False)
    return torch.maximum((mu - 3 * sigma).abs(), (mu + 3 * sigma).abs()) / 2 ** (bits - 1)


class _OffsetQuantize(torch.autograd.Function):
    """x_hat = s * (clip(round(x/s) + z) - z) with the integer zero point z = round(-beta / s).

    Gradients as in LSQ+ (eq. 4, 5): of s, round(.) - (.) inside and the clipped level minus z outside; of beta, 0
    inside and 1 outside. The paper's real-valued beta would be rounded on export; here the forward already does it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, beta: torch.Tensor, step: torch.Tensor,
                zero: torch.Tensor, qp: int, g: float) -> Any:  # fmt: skip
        ctx.save_for_backward(x, step, zero)
        ctx.range = qp, g
        return (x / step).round_().add_(zero).clamp_(0, qp).sub_(zero).mul_(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, step, zero = ctx.saved_tensors
        qp, g = ctx.range
        z = x / step
        low, high = -zero, qp - zero
        inside = (z > low) & (z < high)
        grad_x = grad * inside
        residual = torch.where(inside, z.round() - z, torch.where(z >= high, high, low))
        grad_scale = (grad * residual).sum() * g
        grad_beta = (grad - grad_x).sum() * g
        return grad_x, grad_scale, grad_beta, None, None, None, None


class OffsetQuantizer(StepQuantizer):
    """LSQ+ for an activation with negative values (GELU, swish, a linear layer's output): unsigned with an offset."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, signed=False, per_sample=True)
        self.beta = nn.Parameter(torch.zeros(()))

    def set_range(self, low: float, high: float) -> None:
        """Let the grid span [low, high]."""
        self.set_scale(torch.tensor((high - low) / self.qp))
        with torch.no_grad():
            self.beta.copy_(torch.tensor(low))

    @torch.no_grad()
    def move_scale(self, factor: torch.Tensor) -> None:
        super().move_scale(factor)
        self.beta.copy_(self.beta.double() * factor.to(self.beta.device).double())  # the zero point stays

    def start_from_observer(self, observer: Observer) -> None:
        """The part of what was seen, around zero (which must stay exact: it pads convolutions), of least error."""
        low, high = min(observer.low, 0.0), max(observer.high, 0.0)
        share = best_share(observer.sample(), low, high, self.bits)
        self.set_range(share * low, share * high)

    def zero_point(self, step: torch.Tensor) -> torch.Tensor:
        """The integer that stands for zero."""
        return (-self.beta.detach() / step).round_().clamp_(0, self.qp)

    def quantize(self, v: torch.Tensor, most: float | None = None) -> torch.Tensor:
        v = rectified(v, most)
        if self.observer is None and not self.ready:
            first = Observer(self.name)
            first.see(v.detach())
            self.start_from_observer(first)
        return super().quantize(v)

    def _apply_grid(self, v: torch.Tensor, most: float | None = None) -> torch.Tensor:
        step, v = self.step(), rectified(v, most)
        g = self.gradient_scale(v)
        return _OffsetQuantize.apply(v, self.scale, self.beta, step, self.zero_point(step), self.qp, g)

    @torch.no_grad()
    def integers(self, v: torch.Tensor) -> torch.Tensor:
        step = self.step()
        return (v / step).round_().add_(self.zero_point(step)).clamp_(0, self.qp)

    def activation_spec(self) -> ActivationSpec:
        self._require_ready()
        step = self.step()
        return ActivationSpec(float(step), self.bits, False, int(self.zero_point(step)))


class _Clip(torch.autograd.Function):
    """PACT (arXiv 1805.06085, eq. 1-3): clip at alpha, then round; dy/dalpha = 1 where |x| >= alpha, else 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, qn: int, qp: int) -> Any:
        ctx.save_for_backward(x, step)
        ctx.range = qn, qp
        return (x / step).round_().clamp_(-qn, qp).mul_(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, step = ctx.saved_tensors
        qn, qp = ctx.range
        z = x / step
        grad_x = torch.ops.aten.hardtanh_backward(grad, z, -qn, qp)
        # the learned parameter is the step alpha / Qp, so d alpha = Qp d step; below -Qn the level is -Qn steps
        levels = (z >= qp).to(grad) * qp - (z <= -qn).to(grad) * qn
        return grad_x, (grad * levels).sum(), None, None, None


class ClipQuantizer(StepQuantizer):
    """PACT: the clipping level alpha = scale * Qp is learned from clipped elements alone.

    The parameter is the step, so that a scale means the same in every quantizer; with dalpha = Qp * dstep its
    gradient is the paper's times Qp, which `alpha_gradient` undoes. The paper's L2 penalty on alpha is `penalty`.
    """

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits, signed, per_sample=True)

    def _apply_grid(self, v: torch.Tensor, most: float | None = None) -> torch.Tensor:
        return _Clip.apply(rectified(v, most), self.scale, self.step(), self.qn, self.qp)

    @property
    def alpha(self) -> torch.Tensor:
        """The clipping level."""
        return self.scale * self.qp

    def alpha_gradient(self) -> torch.Tensor | None:
        """dL/dalpha after a backward pass, or None before one."""
        return None if self.scale.grad is None else self.scale.grad / self.qp

    def penalty(self, strength: float) -> torch.Tensor:
        """strength * alpha^2, the paper's regulariser; add it to the loss."""
        return strength * self.alpha.square().sum()


def best_share(sample: torch.Tensor, low: float, high: float, bits: int, candidates: int = 40) -> float:
    """The share of the range [low, high] (zero inside) whose unsigned grid has the least squared error (LSQ+, 3.3)."""
    qp = grid(bits, signed=False)[1]
    best, error = 1.0, math.inf
    for share in torch.linspace(1 / candidates, 1, candidates).tolist():
        step = share * (high - low) / qp
        if step > 0:
            zero = round(-share * low / step)
            found = float((((sample / step).round() + zero).clamp(0, qp).sub(zero).mul(step) - sample).square().mean())
            if found < error:
                best, error = share, found
    return best
