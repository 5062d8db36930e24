"""What rounding has moved on average is put right behind each layer, in order, against the float network.

A correction compares a quantized layer's outputs with the float ones, channel by channel, before the next layer runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.registry import Registry

CORRECTIONS = Registry("correction")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Moments = tuple[Tensor, Tensor]


def none(layer: Any, norm: nn.Module | None, wanted: Moments, found: Moments) -> str:
    """Nothing is corrected."""
    return ""


@torch.no_grad()
def bias(layer: Any, norm: nn.Module | None, wanted: Moments, found: Moments) -> str:
    """b <- b - (E[y_quantized] - E[y_float]): empirical bias correction (arXiv 1906.04721, section 4.2, appendix D).

    Into the layer's bias, or into the running mean of the BatchNorm behind it.
    """
    shift = found[0] - wanted[0]
    if isinstance(norm, _NORMS):
        assert norm.running_mean is not None
        norm.running_mean.add_(shift.to(norm.running_mean))
        return "running mean"
    if layer.bias is None:
        return "skipped: no bias and no BatchNorm"
    layer.bias.sub_(shift.to(layer.bias))
    return "bias"


@torch.no_grad()
def batchnorm(layer: Any, norm: nn.Module | None, wanted: Moments, found: Moments) -> str:
    """Mean and variance as the float network's: BatchNorm's statistics move by what rounding changed.

    The statistics of arXiv 2203.11086 (section 4.3), estimated anew on the quantized network, but relative to the
    float network on the same images: what the data differs by from the training set is left as it was. A layer
    without BatchNorm has its bias corrected.
    """
    done = bias(layer, norm, wanted, found)
    if isinstance(norm, _NORMS):
        assert norm.running_var is not None
        ratio = torch.where(wanted[1] > 0, found[1] / wanted[1].clamp_min(1e-30), torch.ones_like(wanted[1]))
        norm.running_var.mul_(ratio.clamp(0.25, 4.0).to(norm.running_var))
        return "running mean and variance"
    return done


CORRECTIONS.add("none", none, "biases as they are")
CORRECTIONS.add("bias", bias, "the mean of each channel", "1906.04721")
CORRECTIONS.add("batchnorm", batchnorm, "mean and variance of each channel, where BatchNorm follows", "2203.11086")
