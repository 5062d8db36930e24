"""How two outputs are compared: as decisions between classes, label by label, or as numbers.

A row turns outputs into decisions [..., K]: the largest of the last axis is what was decided, and the distance to the
others says how firmly. None stands for numbers that decide nothing; they are held to output steps and the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flatcompress.numerics import kl

Decide = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _last(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    return outputs


def _channels(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.moveaxis(outputs, 1, -1)


def _threshold(outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Absent (0) or present (the logit), for every label by itself."""
    return np.stack([np.zeros_like(outputs), outputs], -1)


AGREEMENTS: dict[str, Decide | None] = {
    "argmax": _last,
    "argmax_channels": _channels,
    "threshold": _threshold,
    "values": None,
}


def distillation(agreement: str, student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """The distance of two outputs, a scalar: T^2 KL (arXiv 1503.02531) a decision, or the mean squared difference.

    The mean is over the batch and over everything that is decided in a sample; no gradient reaches ``teacher``.
    """
    if agreement == "values":
        return F.mse_loss(student, teacher.detach())
    ours, theirs = _decisions(agreement, student), _decisions(agreement, teacher.detach())
    return kl(ours, theirs, temperature).sum() / ours[..., 0].numel() * temperature**2


def _decisions(agreement: str, outputs: Tensor) -> Tensor:
    if agreement == "argmax_channels":
        return outputs.movedim(1, -1)
    return torch.stack([torch.zeros_like(outputs), outputs], -1) if agreement == "threshold" else outputs


def read_agreement(described: Any) -> str:
    """The agreement that a certificate or a file's metadata names; argmax where it names none that is known."""
    found = described.get("output") if isinstance(described, dict) else None
    return found if isinstance(found, str) and found in AGREEMENTS else "argmax"
