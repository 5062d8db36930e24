"""Distillation from the float model, an option for every QAT method."""

from __future__ import annotations

import torch

from flatcompress.numerics import kl


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (arXiv 1503.02531, section 2).

    ``student``, ``teacher``: logits [B, classes]; ``temperature``: T. No gradient reaches the teacher.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> float(distillation_loss(logits, logits))
    0.0
    """
    return kl(student, teacher.detach(), temperature).sum() / len(student) * temperature**2
