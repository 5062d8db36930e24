"""What is learned: the loss that training minimises and the metric that chooses. Image classification, here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, y) -> mean over the batch
Metric = Callable[[Any, Any], int]  # (output, y) -> its sum over the batch; a mean over samples decides


def training_loss(label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of logits [B, classes] and labels [B]."""
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def loss(output: Tensor, y: Tensor) -> Tensor:
    """The loss that everything but training is measured by: without label smoothing, mean over the batch."""
    return nn.functional.cross_entropy(output, y)


def summed_loss(output: Tensor, y: Tensor) -> Tensor:
    """`loss`, summed over the batch."""
    return nn.functional.cross_entropy(output, y, reduction="sum")


def correct(output: Any, y: Any) -> int:
    """How many rows of ``output`` [B, classes] have their largest value at ``y`` [B]; tensors, or numpy arrays."""
    return int((output.argmax(1) == y).sum())
