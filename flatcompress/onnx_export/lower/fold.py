"""BatchNorm folded into integer weights: the integers stay, the scale of each channel and the bias take it up.

``y = gamma (w x + b - mean) / sqrt(var + eps) + beta`` with ``w = s w_int`` is ``s' w_int' x + b'`` where
``s'_c = s_c |gamma_c| / sqrt(var_c + eps)`` and ``w_int'_c = sign(gamma_c) w_int_c`` (arXiv 1712.05877, section 3.2,
with the fold after instead of before quantization, so that a trained grid is kept exactly).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# An int32 accumulator holds the bias and the products; a folded bias beyond this leaves them no room.
BIAS_LIMIT = float(1 << 30)


@dataclass
class Folded:
    """values: integers (wider than int8 where a sign flip made +128 of -128), scale: [out] > 0, bias: [out] real."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None


def norm_factors(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as ``factor * x + offset``, float64 [channels]."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        factor = factor * norm.weight.detach().double()
    offset = -mean * factor
    if norm.affine:
        offset = offset + norm.bias.detach().double()
    return factor, offset


def fold(values: Tensor, scale: Tensor, bias: Tensor | None, norms: list[nn.Module]) -> Folded:
    """Fold ``norms`` in order into integer weights [out, ...] with scale [out] or [1] and a real bias or None."""
    rows = values.shape[0]
    scale = scale.detach().double().reshape(-1).expand(rows).clone()
    shift = None if bias is None else bias.detach().double()
    total = torch.ones(rows, dtype=torch.float64)
    for norm in norms:
        factor, offset = norm_factors(norm)
        shift = offset if shift is None else shift * factor + offset
        total = total * factor
    signs = torch.where(total < 0, -1, 1).to(torch.int16)
    flipped = values.to(torch.int16) * _per_row(signs, values)
    # A gamma of zero silences the channel: no weights, and a scale that is still one.
    silent = total == 0
    flipped[silent] = 0
    scale = scale * torch.where(silent, torch.ones_like(total), total.abs())
    return Folded(flipped, scale, shift)


def integer_bias(folded: Folded, in_scale: float, shift: int = 0) -> tuple[Folded, Tensor | None]:
    """The bias on the int32 grid ``in_scale * scale / 2**shift``, and weights with that finer scale.

    A channel whose bias would leave int32 (a gamma near zero) gets a coarser scale, and its weights, tiny beside
    that bias, are rounded to it.
    """
    scale = (folded.scale / 2**shift).to(torch.float32)
    if folded.bias is None:
        return Folded(folded.values, scale, None), None
    step = torch.tensor(in_scale, dtype=torch.float32) * scale
    tiny = torch.finfo(torch.float32).tiny
    coarser = (folded.bias.abs() / step.double().clamp_min(tiny) / BIAS_LIMIT).clamp_min(1.0)
    values = folded.values
    if bool((coarser > 1).any()):
        values = torch.round(values.double() / _per_row(coarser, values)).to(values.dtype)
        scale = (scale.double().clamp_min(tiny) * coarser).to(torch.float32)
        step = torch.tensor(in_scale, dtype=torch.float32) * scale
    # Half to even in float64: the quotient is exact to far more than the rounding needs.
    whole = torch.round(folded.bias / step.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    return Folded(values, scale, folded.bias), whole.to(torch.int32)


def fold_float(weight: Tensor, bias: Tensor | None, norms: list[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The same for real weights: float32 weight and bias."""
    result, shift = weight.detach().double(), None if bias is None else bias.detach().double()
    for norm in norms:
        factor, offset = norm_factors(norm)
        result = result * _per_row(factor, result)
        shift = offset if shift is None else shift * factor + offset
    return result.float(), None if shift is None else shift.float()


def _per_row(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape([-1] + [1] * (like.dim() - 1))
